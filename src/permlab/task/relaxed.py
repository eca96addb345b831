"""Rules of tasks whose loss reads the relaxed order of every sample."""

from permlab.config.plan import Plan
from permlab.config.schema import component_options, constant
from permlab.ops.scan_order import COMPRESSIBLE


def needs_relaxation(plan: Plan) -> list[str]:
    """What keeps a method from giving every sample a relaxed order of its own at every step, as problems."""
    task, method = plan.config["task"]["name"], plan.config["method"]
    named, reads = f"method={method['name']}", constant("method", method["component"], "reads_items")
    if "estimator" not in component_options("method", method["component"]) or reads is None:
        return [
            f"{named}: task={task} needs a relaxed order of every sample; expected neural_sort, sort_softmax, sinkhorn"
        ]
    key, values = reads
    problems = []
    if method[key] not in values:
        problems.append(
            f"method.{key}={method[key]}: has one order for all samples of task={task}; expected {' or '.join(values)}"
        )
    if method["order"] == COMPRESSIBLE:
        problems.append(
            f"method.order={COMPRESSIBLE}: task={task} orders whole images; expected a scan order, such as row"
        )
    if method.get("surrogate") == "product":
        problems.append(f"method.surrogate=product: is no relaxation, and task={task} needs one; expected softmax")
    for part in ("warmup_fraction", "freeze_fraction"):
        if method[part]:
            problems.append(
                f"method.{part}={method[part]}: nothing of task={task} learns without a relaxation; expected 0"
            )
    return problems
