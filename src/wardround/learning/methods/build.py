"""From the study's method to the object."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from wardround.errors import StudyError
from wardround.learning.methods.method import Array, Method
from wardround.study.methods import CustomMethod, MethodSettings
from wardround.study.plugins import NO_PLUGINS, Plugins

NO_PROTOCOLS: Mapping[str, Array] = MappingProxyType({})


def build_method(
    settings: MethodSettings, protocols: Mapping[str, Array] = NO_PROTOCOLS, plugins: Plugins = NO_PLUGINS
) -> Method:
    """The method of a study; raises StudyError for a custom one that `plugins` do not allow.

    `protocols` are the features (7,) of the training sites' scanners, public as the study is.
    """
    if isinstance(settings, CustomMethod):
        method, place = plugins.load("method", settings.factory)(**settings.options), f"factory={settings.factory!r}"
    else:
        method, place = settings.build(protocols), f"kind={settings.kind!r}"
    if not isinstance(method, Method):
        raise StudyError(f"method.{place} does not make a wardround Method")
    return method
