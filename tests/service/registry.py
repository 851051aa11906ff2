"""The metrics that the service registers, as queries and documentation name them."""

from prometheus_client.metrics import MetricWrapperBase

from text2weight_service.metrics import BUILD_LABELS, Metrics


def registered_metrics() -> dict[str, tuple[str, set[str]]]:
    """Type and labels of every metric of the service, by the name that a query uses."""
    metrics = Metrics()
    metrics.watch_worker(lambda: "ready", lambda: dict.fromkeys(BUILD_LABELS, ""))
    found = {}
    for own in vars(metrics).values():
        if isinstance(own, MetricWrapperBase):
            (family,) = own.describe()
            found[family.name] = (family.type, set(own._labelnames))
    for family in metrics.registry.collect():
        if family.name.startswith("t2w_") and family.name not in found:
            found[family.name] = (family.type, {label for sample in family.samples for label in sample.labels})
    return {name + "_total" * (kind == "counter"): (kind, labels) for name, (kind, labels) in found.items()}
