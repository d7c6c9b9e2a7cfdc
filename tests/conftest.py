import pytest

from sketch_plugins import registry


@pytest.fixture(params=registry.names())
def name(request):
    """Every optimizer of the registry: a new one inherits these tests."""
    return request.param
