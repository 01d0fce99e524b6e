"""Predicted and measured memory of trainings on a GPU: `python -m benchmarks.preflight_memory`.

Random models of 1, 3 and 8 billion weights, in bfloat16, int8 and nf4, with examples of up to 512, 2,048 and 8,192
tokens. Each is planned from its shape, then trained for two steps in a process of its own; what PyTorch's allocator had
given out at its highest is compared with the plan. `--device cpu` shows that the script works, with a small model and
resident memory.
"""

import json
import tempfile
from pathlib import Path

import torch

from benchmarks import train_subject
from benchmarks.harness import arguments, in_process, report
from finetune_assets.config.schema import Data, ExperimentConfig, Lora, Model, Tokenization, Training
from finetune_assets.preflight.case import Case, Shape
from finetune_assets.preflight.device import Device
from finetune_assets.preflight.memory import MIB
from finetune_assets.preflight.plan import settled
from finetune_assets.preflight.work import work_of
from finetune_assets.sources.local import SAMPLE
from finetune_assets.training.distributed import DistributedContext
from finetune_assets.training.recipe import LoraFinetune
from finetune_assets.training.reporting import Reporter
from finetune_assets.training.state import TrainingPaths
from finetune_assets.training.telemetry import hardware_name, peak_memory_mib

KINDS = ("none", "int8", "nf4")
SIZES = {
    "cuda": [
        (shape, length) for shape in ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b") for length in (512, 2048, 8192)
    ],
    "cpu": [("13m", 256)],
}
STEPS, EXAMPLES, MICRO = 2, 400, 4


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--one", nargs=2, metavar=("SUBJECT", "QUANTIZATION"), help="train it in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(compared(train_subject.read(Path(args.one[0])), args.one[1], torch.device(args.device))))
        return
    rows, ratios = [], {}
    for shape, length in SIZES[args.device][: 1 if args.quick else None]:
        with tempfile.TemporaryDirectory() as name:
            subject = train_subject.make(Path(name), shape, SAMPLE, EXAMPLES, length, STEPS, args.device)
            subject.write(Path(name) / "subject.json")
            for kind in KINDS:
                one = ["--one", f"{name}/subject.json", kind, "--device", args.device]
                found = in_process("benchmarks.preflight_memory", *one)
                case, ratio = f"{shape}, {kind}, {length} tokens", found["predicted_mib"] / found["measured_mib"]
                rows.append(
                    (case, f"{found['predicted_mib']:,.0f} MiB predicted, {found['measured_mib']:,.0f} measured")
                )
                ratios[case] = ratio
    report("Memory, predicted over measured", rows, ratios, args.json)


def compared(subject: train_subject.Subject, quantization: str, device: torch.device) -> dict[str, float]:
    """MiB that a training of two steps takes, as planned and as measured."""
    config = ExperimentConfig(
        model=Model(base_model=subject.model, quantization=quantization),  # type: ignore[arg-type]
        data=Data(tokenization=Tokenization(cutoff_len=subject.length)),
        training=Training(max_steps=STEPS, macro_batch_size=MICRO, micro_batch_size=MICRO, save_steps=None),
        lora=Lora(),
    )
    work = work_of(Path(subject.packed), config, processes=1)
    size = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 16 << 30
    planned_for = Device(device.type, size, 1, device.type == "cuda", hardware_name(device))
    case = Case(Shape.read(Path(subject.model), own_code=False), config, planned_for, work.lengths, work.learned, False)
    case, memory, unknown = settled(case)
    assert memory, unknown
    config.training.gradient_checkpointing = case.checkpointing
    job = TrainingPaths(Path(subject.model), Path(subject.packed), Path("/nowhere"), Path("/nowhere"), {})
    run = LoraFinetune(job, config, DistributedContext(0, 1, device), Reporter(lambda line: None))
    for number, step in run._work():
        run.train_step(number, step)
    return {"predicted_mib": memory.total / MIB, "measured_mib": peak_memory_mib(device)}


if __name__ == "__main__":
    main()
