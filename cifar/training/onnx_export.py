"""Networks as ONNX files: made by torch's exporter, and compared with the network itself in ONNX Runtime.

The graph takes raw images, (batch, 3, 32, 32) uint8, so the normalisation is inside it and nobody can get it wrong; it gives
logits, (batch, 10) float32. The packages onnx, onnxscript and onnxruntime are the extra `cifar[onnx]`, and imported only here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cifar.errors import UserError
from cifar.flops import keep_random_state
from cifar.system.user_code import describe_error, pass_interrupt
from cifar.training.parts import describe_output_problem

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "images", "logits"
OPSET = 18  # of 2022: what torch's exporter writes without conversion
TOLERANCE = 1e-4  # of the largest logit, or of 1: both sum in float32, in another order
CHECKED_BATCHES = (1, 2, 7)  # none is the size that the graph is made with, but one


def check_packages() -> None:
    """Raise UserError where a package of the extra is missing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"an ONNX file needs the package{'s' * (len(missing) > 1)} {', '.join(missing)}: pip install 'cifar[onnx]'"
        )


def export_onnx(network: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """The ONNX file of a network in evaluation mode that takes raw images (a `PixelNetwork`).

    Nothing in it names this machine: the exporter's stack traces are left out. Raises UserError where torch cannot export it.
    """
    import onnx

    try:
        with keep_random_state(), torch.no_grad(), _quiet():
            model = _convert(network)
        onnx.checker.check_model(model)
    except BaseException as error:  # the exporter meets the network's own code, and raises many kinds of errors
        pass_interrupt(error)
        raise UserError(f"it cannot be exported: {_describe(error)}") from error
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError(
            "it cannot be exported: its forward pass fixes the size of the batch (a loop over the images, say); "
            "write x.shape[0] for the size, and operations on whole batches"
        )
    for holder in [
        model.graph,
        *model.graph.node,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
        *model.functions,
    ]:
        del holder.metadata_props[:]
    for function in model.functions:
        for node in function.node:
            del node.metadata_props[:]
    model.doc_string = ""
    onnx.helper.set_model_props(model, dict(metadata))
    content: bytes = model.SerializeToString()
    return content


def _convert(network: nn.Module) -> Any:
    """The `onnx.ModelProto` of a network. Its batch has a fixed size where the network's code lets no other one."""
    images, shapes = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), ({0: torch.export.Dim("batch")},)
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "opset_version": OPSET, "verbose": False}
    program = torch.onnx.export(network, (images,), dynamo=True, dynamic_shapes=shapes, **names)
    assert program is not None
    if program.model_proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        return program.model_proto
    try:  # the stricter way reads Python's byte code, and understands `len(x)`
        exported = torch.export.export(network, (images,), dynamic_shapes=shapes, strict=True)
        again = torch.onnx.export(exported, dynamo=True, **names)
    except Exception:
        return program.model_proto
    assert again is not None
    return again.model_proto


def open_session(content: bytes) -> Callable[[Tensor], Tensor]:
    """An ONNX file in ONNX Runtime, on the CPU -> a function: raw images (B, 3, 32, 32) uint8 -> logits (B, 10)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.contiguous().numpy()})[0])


def compare_logits(network: nn.Module, predict: Callable[[Tensor], Tensor]) -> float:
    """The largest difference between both on random images, in batches of several sizes, as a share of the largest logit.

    Raises UserError where it is more than TOLERANCE, or where a batch is refused.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for size in CHECKED_BATCHES:
        images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator)
        try:
            with torch.inference_mode():
                wanted, found = network(images), predict(images)
        except Exception as error:  # ONNX Runtime's own kinds
            raise UserError(
                f"its ONNX file does not work in ONNX Runtime with a batch of {size}: {_describe(error)}"
            ) from error
        if problem := describe_output_problem(wanted, size) or describe_output_problem(found, size):
            raise UserError(f"it cannot be exported: {problem}")
        difference = float((wanted - found).abs().max()) / max(1.0, float(wanted.abs().max()))
        worst = max(worst, difference if difference == difference else float("inf"))
    if worst > TOLERANCE:
        raise UserError(
            f"its ONNX file gives other logits than it does (by {worst:.1e} of the largest; {TOLERANCE:.0e} is allowed): a "
            "part of it may be random in evaluation mode, or the exporter does not know it well"
        )
    return worst


def _describe(error: BaseException) -> str:
    """The first lines of an error that say something; torch's exporter wraps the one that it met."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(describe_error(error).split())[:400]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints about itself. Its errors are raised."""
    logger = logging.getLogger("torch.onnx")
    level, was_disabled = logger.level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        logging.disable(was_disabled)


def describe_metadata(name: str, normalize: str, card: Mapping[str, Any]) -> dict[str, str]:
    """What the file itself says about its network."""
    facts = {
        "name": name,
        "input": "uint8 images (batch, 3, 32, 32), red, green, blue, 0 to 255; the normalisation is in the graph",
        "normalize": normalize,
    }
    if card:
        facts |= {"test_accuracy": f"{card['accuracy']:.4f}", "classes": ",".join(card.get("classes", ()))}
        facts |= {"licence": str(card.get("licence", "")), "made_by": str((card.get("training") or {}).get("command", ""))}
    return {key: text for key, text in facts.items() if text}
