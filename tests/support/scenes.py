"""Scenes that mostly wait, played side by side: the first test of a file that asks for one begins all that were selected."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

_AT_ONCE = 3  # more would take so much of two cores that patience runs out where nothing is wrong


class Scenes:
    """The scenes of a file, each a function of (shards, folder of its own, folder of an undisturbed run)."""

    def __init__(self):
        self._known: dict[str, Callable] = {}

    def __call__(self, scene: Callable) -> Callable:
        """A decorator: ``scene`` is one of them."""
        self._known[scene.__name__] = scene
        return scene

    @property
    def every(self) -> pytest.MarkDecorator:
        """Gives a test the argument ``scene``, the name of each; it asks ``play`` for the scene's end."""
        return pytest.mark.parametrize("scene", self._known)

    def play(self, request: pytest.FixtureRequest, shards, undisturbed, folders) -> Iterator[dict[str, Future]]:
        """What a fixture of the file yields: by name, the ends of the scenes whose tests were selected."""
        names = [item.callspec.params["scene"] for item in request.session.items
                 if item.path == request.path and "scene" in item.fixturenames]  # fmt: skip
        stage = ThreadPoolExecutor(_AT_ONCE)
        try:
            yield {name: stage.submit(self._known[name], shards, folders.mktemp(name), undisturbed) for name in names}
        finally:
            stage.shutdown(cancel_futures=True)
