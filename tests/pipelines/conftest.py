import pytest

from tests.dit import make_pipeline


@pytest.fixture(params=["image", "video"])
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind):
    return make_pipeline(kind)
