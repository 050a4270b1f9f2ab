"""An exported ONNX file as OpenVINO's model.xml and model.bin."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from posefabric.deploy.openvino_predictor import (
    METADATA,
    has_bf16,
    openvino_core,
    require_openvino,
)
from posefabric.run import write_atomic
from posefabric.structures import PosefabricError


def convert(model: bytes, path: Path, *, metadata: dict[str, Any]) -> Path:
    """Write an ONNX file, float or int8 (QDQ), as ``path`` (.xml) and the .bin beside it.

    Weights keep their type: what a converted file loses is what its precision loses.
    ``metadata`` goes into the .xml, for :class:`OpenvinoPoseEstimator`.

    Raises PosefabricError when openvino is missing, or cannot read the graph.
    """
    openvino, core = require_openvino(), openvino_core()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        source.write_bytes(model)
        try:
            converted = core.read_model(source)
        # Its errors have no common base class but Exception.
        except Exception as error:
            raise PosefabricError(
                f"openvino {openvino.__version__} cannot read the exported graph ({error})"
            ) from error
        converted.set_rt_info(json.dumps(metadata), list(METADATA))
        written = Path(folder) / "model.xml"
        openvino.save_model(converted, written, compress_to_fp16=False)
        # The weights first: an .xml is never there without its .bin.
        write_atomic(path.with_suffix(".bin"), written.with_suffix(".bin").read_bytes())
        write_atomic(path, written.read_bytes())
    return path


def require_bf16() -> None:
    """PosefabricError where openvino does not compute in bf16 on this CPU.

    Without the arithmetic it computes in fp32, and a loss measured so would be none.
    """
    if not has_bf16():
        name = openvino_core().get_property("CPU", "FULL_DEVICE_NAME")
        raise PosefabricError(
            f"--quantize bf16: this CPU ({name}) has no "
            "bf16 arithmetic: openvino would compute in fp32, and the loss could not be measured; "
            "export on a CPU with AVX-512 BF16, AMX or Arm's bf16, or take --quantize int8"
        )
