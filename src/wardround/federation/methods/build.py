"""From the study's method to the object."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from wardround.errors import StudyError
from wardround.federation.methods.method import Array, Method
from wardround.federation.methods.personal import FedBN, FedCT, FedFDD, HyperFed
from wardround.federation.methods.proximal import FedProx
from wardround.federation.methods.scan import ScanPhysFed
from wardround.federation.methods.server import FedAdam, FedAvgM
from wardround.study import methods as methods_config

ENTRY_POINTS = "wardround.methods"
NO_PROTOCOLS: Mapping[str, Array] = MappingProxyType({})


def build_method(config: methods_config.Method, protocols: Mapping[str, Array] = NO_PROTOCOLS) -> Method:
    """The method of a study; a custom one comes from an entry point or from `package.module:callable`.

    `protocols` are the features (7,) of the training sites' scanners, public as the study is.
    """
    match config:
        case methods_config.CustomMethod():
            return _custom(config)
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


def _custom(config: methods_config.CustomMethod) -> Method:
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    try:
        if config.factory in found:
            factory: Any = found[config.factory].load()
        else:
            module, _, name = config.factory.partition(":")
            factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise StudyError(
            f"method.factory={config.factory!r} cannot be imported; it must be an entry point of the group "
            f"{ENTRY_POINTS} ({', '.join(sorted(found)) or 'none installed'}) or package.module:callable"
        ) from error
    method = factory(**config.options)
    if not isinstance(method, Method):
        raise StudyError(f"method.factory={config.factory!r} does not make a wardround Method")
    return method
