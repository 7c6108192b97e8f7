// Standard normal noise: for a seed, the numbers of `torch.randn(n, generator=torch.Generator().manual_seed(seed))`.

const SIZE = 624, SHIFT = 397; // of the Mersenne twister
const BLOCK = 16; // numbers that PyTorch makes of as many uniform ones: cosines, then sines

/** A function that gives the next 32 bits of the Mersenne twister. */
function twister(seed) {
  const state = new Uint32Array(SIZE);
  state[0] = seed;
  for (let i = 1; i < SIZE; i++) {
    state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  }
  let index = SIZE;
  return () => {
    if (index === SIZE) {
      for (let i = 0; i < SIZE; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
        state[i] = state[(i + SHIFT) % SIZE] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      index = 0;
    }
    let y = state[index++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** `count` numbers, at least 16, as Float32Array. */
export function noise(seed, count) {
  if (count < BLOCK) throw new RangeError(`Noise of ${count} numbers: 16 is the least.`);
  const next = twister(seed);
  const uniform = () => (next() & 0xffffff) / 2 ** 24;
  const numbers = Float32Array.from({ length: count }, uniform);
  const toNormal = (start) => {
    for (let i = start; i < start + BLOCK / 2; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - numbers[i]));
      const angle = 2 * Math.PI * numbers[i + BLOCK / 2];
      numbers[i] = radius * Math.cos(angle);
      numbers[i + BLOCK / 2] = radius * Math.sin(angle);
    }
  };
  const whole = count - (count % BLOCK);
  for (let start = 0; start < whole; start += BLOCK) toNormal(start);
  if (whole < count) { // the last 16 are made anew
    for (let i = count - BLOCK; i < count; i++) numbers[i] = uniform();
    toNormal(count - BLOCK);
  }
  return numbers;
}
