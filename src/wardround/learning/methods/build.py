"""From the study's method to the object."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from wardround.errors import StudyError
from wardround.learning.methods.method import Array, Method
from wardround.learning.methods.personal import FedBN, FedCT, FedFDD, HyperFed
from wardround.learning.methods.proximal import FedProx
from wardround.learning.methods.scan import ScanPhysFed
from wardround.learning.methods.server import FedAdam, FedAvgM
from wardround.study import methods as methods_config
from wardround.study.plugins import NO_PLUGINS, Plugins

NO_PROTOCOLS: Mapping[str, Array] = MappingProxyType({})


def build_method(
    config: methods_config.Method, protocols: Mapping[str, Array] = NO_PROTOCOLS, plugins: Plugins = NO_PLUGINS
) -> Method:
    """The method of a study; raises StudyError for a custom one that `plugins` do not allow.

    `protocols` are the features (7,) of the training sites' scanners, public as the study is.
    """
    match config:
        case methods_config.CustomMethod():
            return _custom(config, plugins)
        case methods_config.FedProx():
            return FedProx(config.weights, mu=config.mu)
        case methods_config.FedBN():
            return FedBN(config.weights, config.stranger)
        case methods_config.HyperFed():
            return HyperFed(config.weights, config.stranger)
        case methods_config.ScanPhysFed():
            scanners = tuple((site, tuple(float(v) for v in g)) for site, g in protocols.items())
            return ScanPhysFed(config.weights, config.stranger, repulsion=config.repulsion, scanners=scanners)
        case methods_config.FedFDD():
            return FedFDD(config.weights, config.stranger, private=config.private)
        case methods_config.FedCT():
            return FedCT(config.weights, config.stranger)
        case methods_config.FedAvgM():
            return FedAvgM(config.weights, momentum=config.momentum, server_lr=config.server_lr)
        case methods_config.FedAdam():
            return FedAdam(
                config.weights,
                server_lr=config.server_lr,
                beta1=config.beta1,
                beta2=config.beta2,
                tau=config.tau,
            )
        case methods_config.FedAvg():
            return Method(config.weights)


def _custom(config: methods_config.CustomMethod, plugins: Plugins) -> Method:
    method = plugins.load("method", config.factory)(**config.options)
    if not isinstance(method, Method):
        raise StudyError(f"method.factory={config.factory!r} does not make a wardround Method")
    return method
