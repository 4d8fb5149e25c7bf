"""Imports point upward only: a module may import what stands above it here, so the pipeline reads top to bottom."""

import ast
from pathlib import Path

import pgfunc

ORDER = [
    "errors", "names", "files", "files.locks", "files.journal", "files.atomic", "files.outputs", "files.jsonfile",
    "files.jsonlines",
    "files.web", "tree", "config", "lowering", "taps", "quant.lowbit", "quant", "masks", "ops", "cache", "siglip",
    "siglip_dual", "gemma", "paligemma", "packing", "kernels", "kernels.device", "kernels.device_attention",
    "kernels.launch", "kernels.tuning", "kernels.calls", "kernels.reference", "kernels.operators", "kernels.rules",
    "image", "tokenizer.growth", "tokenizer.special", "tokenizer", "siglip_dual.prompt", "prompt", "sample",
    "jit.arguments", "jit.reasons", "jit.cuda_graphs", "jit.donation", "jit.rows", "jit.closures", "jit.overwriting",
    "jit.compilation", "jit.code_folder", "jit.function", "jit", "generate", "many.reading", "many.decoding",
    "many.prefilling", "many.scheduling", "many", "bench.roofline", "bench.measuring",
    "bench.inputs", "bench.pipeline", "bench", "objects", "objects.grammar", "objects.boxes", "objects.masks",
    "objects.fonts", "objects.draw", "objects.result", "objects.detect", "objects.vqvae",
    "checkpoint.keys", "checkpoint.tables", "checkpoint.writing", "checkpoint.processor", "checkpoint.fields",
    "checkpoint.hf_config", "checkpoint.siglip_config", "checkpoint.shards", "checkpoint.hf", "checkpoint.bigvision",
    "checkpoint.source", "checkpoint.lora", "checkpoint.vqvae", "checkpoint", "checkpoint.siglip",
    "checkpoint.conversion", "many.distributed", "objects.segment", "objects.coco", "lab.naming",
    "lab.functions", "lab.edits", "lab.readings", "lab.collecting", "lab.probes", "lab.sae", "lab.pictures", "lab",
    "__init__",
    "evaluation", "evaluation.metrics", "evaluation.captions", "evaluation.questions", "evaluation.reading",
    "evaluation.boxes", "evaluation.masks", "evaluation.rows", "evaluation.tasks", "evaluation.page",
    "train", "train.contrastive", "train.optim", "train.data", "train.finetune", "train.lora", "train.run",
    "train.fit", "laws.system", "laws.strategies", "laws.law", "laws.model", "laws.transforms", "laws.lab",
    "laws.parts", "laws.sampling", "laws.stored", "laws.texts", "laws.pictures", "laws.losses", "laws.adapters",
    "laws.hf", "laws.check", "laws", "demo", "demo.actions", "demo.attention", "demo.snippet", "demo.style",
    "demo.page", "demo.server",
    "cli.examples", "cli.options", "cli.devices", "cli.compiled", "cli.inputs", "cli.results", "cli.running",
    "cli.machines", "cli.drawings", "cli.answering", "cli.comparing", "cli.text", "cli.contrast", "cli.progress",
    "cli.finding", "cli.locate", "cli.evaluate", "cli.validation", "cli.train", "cli.demo", "cli.checkpoints",
    "cli.compile", "cli.measuring", "cli.bench", "cli.law_systems", "cli.laws", "cli", "cli.__main__", "__main__",
]  # fmt: skip
EXCEPTIONS = {
    "lowering": {"kernels.rules"},  # while compiled code is traced: whoever compiles anything gets the whole table
    "__init__": {"laws"},  # when `pg.laws` is first used
}
PACKAGE = Path(pgfunc.__file__).parent


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {local(alias.name) for alias in node.names if alias.name.split(".")[0] == "pgfunc"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("", "pgfunc"):
            assert not node.level, f"{path}: imports are absolute"
            inner = {local(f"{node.module}.{alias.name}") for alias in node.names}
            found |= {name if name in ORDER else local(node.module) for name in inner}
    return found


def local(name: str) -> str:
    return name.removeprefix("pgfunc").removeprefix(".") or "__init__"


def test_every_module_has_a_place():
    assert {module(path) for path in PACKAGE.rglob("*.py")} == set(ORDER)


def test_imports_point_upward():
    for path in PACKAGE.rglob("*.py"):
        place = ORDER.index(module(path))
        for name in imports(path) - EXCEPTIONS.get(module(path), set()):
            assert ORDER.index(name) < place, f"{module(path)} imports {name}, which stands below it"
