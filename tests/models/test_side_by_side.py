"""A call keeps the tiles, slices and windows with which it started, whatever other threads switch meanwhile."""

import pytest
import torch

from tests.conftest import assert_close, make_input, make_vae
from tests.faults.side_by_side import CALLS, STATES, switch
from tests.threads import together


@pytest.mark.parametrize("before, after", [(0, 1), (1, 0), (1, 2)])
@pytest.mark.parametrize("group", STATES)
@pytest.mark.parametrize("call", CALLS)
def test_a_switch_in_a_call(call, group, before, after):
    vae = make_vae("v1")
    assert_close(*switch(vae, call, group, before, after))
    STATES[group][after](vae)
    _, other = switch(vae, call, group, after, before)
    _, ours = switch(vae, call, group, before, after)
    assert call == "streams" and group == "tiling" or (other - ours).abs().max() > 1e-3  # the switch matters


@torch.no_grad()
def test_a_stream_keeps_its_settings_from_when_it_was_made():
    vae = make_vae("video")
    clip = make_input(vae, 1, 32, 32).repeat(1, 1, 4, 1, 1)
    vae.enable_tiling(32, 4, 0.5)
    expected, stream = list(vae.encode_stream([clip])), vae.encode_stream([clip])
    vae.enable_tiling(32, 8, 0.0)
    vae.enable_sliding_window(1)
    assert_close(torch.cat(list(stream), dim=2), torch.cat(expected, dim=2))


@torch.no_grad()
def test_threads_in_one_autoencoder():
    vae = make_vae("v2")
    inputs = [make_input(vae, count, 24, 32) for count in (1, 2, 3)]
    expected = [vae(x).sample for x in inputs]
    results = together([lambda meet, x=x: [meet(), vae(x).sample.detach()][1] for x in inputs])
    for result, wanted in zip(results, expected):
        assert_close(result, wanted)
