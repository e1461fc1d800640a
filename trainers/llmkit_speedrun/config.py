"""Options of the trainer `speedrun`: presets, what follows from them, schedules. Importing it imports nothing heavy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmkit.component import nearest
from llmkit.options import check, option
from llmkit.trainer import SCHEDULES, TrainConfig

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint
    from llmkit.data.tokens import TokenData

#: what `--without` can switch off, for ablations
FEATURES = (
    "rotary",
    "qk-norm",
    "relu2",
    "untied-head",
    "zero-init",
    "value-residual",
    "embedding-shortcut",
    "unet-skips",
    "softcap",
    "document-mask",
)
SOFTCAP = 30.0
#: Weights of the losses on the next token and those after it, by thirds of the run, as in modded-nanogpt
MULTI_TOKEN_WEIGHTS = ((1.0, 0.5, 0.25), (1.0, 0.5), (1.0,))

#: preset -> option -> value, for options that are not given
PRESETS: dict[str, dict[str, Any]] = {
    # The best of those compared on novels, 4 layers of 128 channels, 8192 tokens a step: see docs/speedrun.md.
    "small": {
        "learning_rate": 0.04,
        "embedding_learning_rate": 0.6,
        "head_learning_rate": 0.016,
        "scalar_learning_rate": 0.01,
        "warmdown_fraction": 0.5,
        "momentum_warmup_steps": 500,
    },
    # The record of 2024-11-19: github.com/KellerJordan/modded-nanogpt, records/track_1_short/2024-11-19_FlexAttention.
    # 8 GPUs took 65536 tokens each; here they follow each other.
    "record-2024-11": {
        "depth": 12,
        "width": 768,
        "heads": 6,
        "total_batch_tokens": 8 * 65536,
        "steps": 1875,
        "window": 1024,
        "learning_rate": 0.04,
        "embedding_learning_rate": 0.6,
        "head_learning_rate": 0.008,
        "scalar_learning_rate": 0.04,
        "warmdown_fraction": 562 / 1875,
        "momentum_warmup_steps": 500,
    },
}
RECORD_STREAM = 65536


@dataclass(frozen=True, kw_only=True)
class SpeedrunTrainConfig(TrainConfig):
    """What `speedrun` adds to the shared options, and where its defaults differ."""

    preset: str = option(
        "small", "Values of options that are not given: for a small model, or those of the 5-minute record.",
        choices=tuple(PRESETS),
    )  # fmt: skip
    learning_rate: float | None = option(None, "Peak learning rate of Muon. [default: the preset's]", minimum=0)
    embedding_learning_rate: float | None = option(
        None, "Adam's, for the embedding. [default: the preset's]", minimum=0
    )
    head_learning_rate: float | None = option(None, "Adam's, for the head. [default: the preset's]", minimum=0)
    scalar_learning_rate: float | None = option(None, "Adam's, for the scalars. [default: the preset's]", minimum=0)
    schedule: str = option(
        "warmdown", "Learning rates after the warm-up; warmdown: constant, then linear.",
        choices=("warmdown", *SCHEDULES),
    )  # fmt: skip
    warmup_steps: int | None = option(None, "Steps of linear warm-up. [default: 0]", minimum=0)
    warmdown_fraction: float | None = option(
        None, "Part of the run in which warmdown lowers the rates. [default: the preset's]", minimum=0, maximum=1
    )
    final_lr_fraction: float = option(0.0, "Final learning rates, as a fraction of the peak.", minimum=0, maximum=1)
    weight_decay: float = option(0.0, "Decay of the matrices that Muon trains.", minimum=0)
    grad_clip: float = option(0.0, "Largest gradient norm; 0 does not clip.", minimum=0)
    momentum: float = option(0.95, "Muon's momentum.", minimum=0, maximum=1)
    momentum_warmup_steps: int | None = option(
        None, "Steps in which the momentum grows to its value from 0.85. [default: the preset's]", minimum=0
    )
    optimizer: str = option(
        "muon", "What trains the matrices of the blocks; adamw is for comparison.", choices=("muon", "adamw")
    )
    ns_dtype: str | None = option(
        None, "Arithmetic of Newton-Schulz. [default: bf16 where the hardware computes it, else fp32]",
        choices=("fp32", "bf16"),
    )  # fmt: skip
    window: int | None = option(None, "Tokens back that attention reaches. [default: the whole sequence]", minimum=1)
    window_warmup_steps: int = option(
        0, "Steps in which the window grows to its size from an eighth of it.", minimum=0
    )  # fmt: skip
    polar_express: bool = option(False, "Newton-Schulz with the coefficients of Polar Express.")
    normuon: bool = option(False, "NorMuon: Muon's rows are divided by their running size.")
    cautious_weight_decay: bool = option(False, "Decay a weight only where its update has its sign.")
    value_embeddings: bool = option(False, "Add gated embeddings of the token to the values of every other layer.")
    multi_token_prediction: bool = option(False, "Predict the next three tokens at first, then two, then one.")
    batch_schedule: bool = option(False, "A third of the batch for a third of the steps, then two thirds, then all.")
    without: str = option("", f"Architecture without these features, for ablations: {', '.join(FEATURES)}.")
    compile: bool = option(False, "Compile the model with torch.compile: slow to start, faster steps.")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps. [default: the best there is]")
    threads: int | None = option(
        None, "CPU threads of each process. [default: PyTorch's, shared by the processes]", minimum=1
    )
    nproc: int = option(1, "Processes on this machine, one for each GPU: data parallel, optimisers' state and "
                           "Newton-Schulz shared out.", minimum=1)  # fmt: skip
    fsdp: bool = option(False, "Share out the model too (FSDP2), for one that does not fit one device.")

    @property
    def switched_off(self) -> frozenset[str]:
        """The features of `--without`. Raises ValueError for a name that is none."""
        names = frozenset(name.strip() for name in self.without.split(",") if name.strip())
        for name in sorted(names - set(FEATURES)):
            raise ValueError(f"--without {name}: {nearest(name, FEATURES)}")
        return names


def resolve(
    config: SpeedrunTrainConfig, data: TokenData, start: Checkpoint | None, *, processes: int = 1
) -> SpeedrunTrainConfig:
    """Fill in what was not given, the device's part apart. Raises ValueError, naming the flag, for what cannot work."""
    from llmkit import recipe

    check(config)
    _ = config.switched_off  # checks the names
    if start is not None:
        config = _take_shape(config, data, start)
    values = {"warmup_steps": 0, **PRESETS[config.preset]}
    if config.size is not None or start is not None:  # they give the shape
        values = {name: value for name, value in values.items() if name not in ("depth", "width", "heads")}
    config = dataclasses.replace(config, **{k: v for k, v in values.items() if getattr(config, k) is None})
    config = recipe.resolve(config, data, None, processes=processes)
    assert config.width and config.heads and config.sequence_length and config.total_batch_tokens and config.batch_size
    if config.width // config.heads % 2:
        raise ValueError(f"--heads {config.heads} of {config.width} channels have an odd size, and rotary needs pairs")
    if config.cautious_weight_decay and not config.weight_decay:
        raise ValueError("--cautious-weight-decay needs a --weight-decay above 0")
    if config.optimizer != "muon":
        for name in ("normuon", "polar_express", "cautious_weight_decay"):
            if getattr(config, name):
                raise ValueError(f"--{name.replace('_', '-')} belongs to Muon: leave it out, or --optimizer adamw")
    micro_batches = config.total_batch_tokens // (config.batch_size * config.sequence_length)
    if config.batch_schedule and micro_batches < 3:
        raise ValueError(
            f"--batch-schedule needs 3 micro-batches in a step, and --total-batch-tokens {config.total_batch_tokens} "
            f"has {micro_batches}: lower --batch-size or --sequence-length"
        )
    assert config.steps
    for count in sorted({micro_batches_at(step, config) for step in range(config.steps)}):
        if count % processes:
            raise ValueError(
                f"--batch-schedule has steps of {count} micro-batches, which do not divide into {processes} processes: "
                "lower --batch-size or --sequence-length, or choose another --nproc"
            )
    return config


def _take_shape(config: SpeedrunTrainConfig, data: TokenData, start: Checkpoint) -> SpeedrunTrainConfig:
    """The architecture of the checkpoint that training begins with; what was given must agree with it."""
    from llmkit.gpt2 import shape_of_size

    if start.architecture != "SpeedrunForCausalLM":
        raise ValueError(f"--from {start.path} is a {start.architecture}, and speedrun trains SpeedrunForCausalLM only")
    if start.tokenizer.fingerprint != data.tokenizer_fingerprint:
        raise ValueError(
            f"the data in {data.path} were made with another tokenizer than the checkpoint's: prepare them with "
            f"--tokenizer {start.path}"
        )
    c = start.config
    shape = {"depth": c["num_hidden_layers"], "width": c["hidden_size"], "heads": c["num_attention_heads"]}
    if config.size is not None and shape_of_size(config.size) != tuple(shape.values()):
        raise ValueError(f"--size {config.size} contradicts the checkpoint of --from")
    for name, value in shape.items():
        if getattr(config, name) not in (None, value):
            raise ValueError(
                f"--{name} {getattr(config, name)} contradicts the checkpoint of --from, which has {value}"
            )
    off = {name for name in FEATURES if not feature_of(c, name)} | config.switched_off & {"document-mask"}
    if config.switched_off - off:
        raise ValueError(f"--without {config.without} contradicts the checkpoint of --from, whose architecture has it")
    if config.value_embeddings and not c["value_embeddings"]:
        raise ValueError("--value-embeddings contradicts the checkpoint of --from, which has none")
    without = ",".join(sorted(off))
    return dataclasses.replace(config, size=None, without=without, value_embeddings=c["value_embeddings"], **shape)


def feature_of(model: dict[str, Any], name: str) -> bool:
    """Does a config.json have the feature? The document mask belongs to training, so every model has it."""
    if name == "softcap":
        return model["final_logit_softcapping"] is not None
    if name == "untied-head":
        return not model["tie_word_embeddings"]
    return name == "document-mask" or bool(model[name.replace("-", "_")])


def model_options(config: SpeedrunTrainConfig, vocab: int, eot_id: int | None) -> dict[str, Any]:
    """Arguments of SpeedrunConfig for a resolved configuration."""
    off = config.switched_off
    assert config.sequence_length
    window = config.window if config.window and config.window < config.sequence_length else None
    flags = [name for name in FEATURES if name not in ("softcap", "untied-head", "document-mask")]
    return {
        "vocab_size": vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.sequence_length,
        "sliding_window": window,
        "final_logit_softcapping": None if "softcap" in off else SOFTCAP,
        "tie_word_embeddings": "untied-head" in off,
        "value_embeddings": config.value_embeddings,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        **{name.replace("-", "_"): name not in off for name in flags},
    }


def rate_factor_at(step: int, config: SpeedrunTrainConfig) -> float:
    """What every learning rate is multiplied by in step number `step`, counted from 0."""
    from llmkit.recipe import learning_rate_at

    assert config.steps and config.warmup_steps is not None and config.warmdown_fraction is not None
    if config.schedule != "warmdown" or step < config.warmup_steps:
        schedule = "constant" if config.schedule == "warmdown" else config.schedule
        return learning_rate_at(step, dataclasses.replace(config, learning_rate=1.0, schedule=schedule))
    left = (config.steps - step) / max(1.0, config.warmdown_fraction * config.steps)
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * min(1.0, left)


def momentum_at(step: int, config: SpeedrunTrainConfig) -> float:
    """Muon's momentum: from 0.85, or its value if that is lower, linearly to its value."""
    assert config.momentum_warmup_steps is not None
    done = min(1.0, step / max(1, config.momentum_warmup_steps))
    first = min(0.85, config.momentum)
    return first + done * (config.momentum - first)


def window_at(step: int, config: SpeedrunTrainConfig) -> int:
    """Tokens that attention reaches back, itself included: from an eighth linearly to all, in eighths of the window.

    In eighths, so that a compiled attention sees few different windows.
    """
    assert config.sequence_length
    window = min(config.window or config.sequence_length, config.sequence_length)
    eighths = 8 if step >= config.window_warmup_steps else 1 + 7 * step // config.window_warmup_steps
    return max(1, window * eighths // 8)


def micro_batches_at(step: int, config: SpeedrunTrainConfig) -> int:
    """Micro-batches that step number `step` accumulates."""
    assert config.total_batch_tokens and config.batch_size and config.sequence_length and config.steps
    whole = config.total_batch_tokens // (config.batch_size * config.sequence_length)
    if not config.batch_schedule:
        return whole
    return max(1, round(whole * (1 + 3 * step // config.steps) / 3))


def token_weights_at(step: int, config: SpeedrunTrainConfig) -> tuple[float, ...]:
    """Weights of the losses on the next token, the one after it, …"""
    assert config.steps
    return MULTI_TOKEN_WEIGHTS[3 * step // config.steps] if config.multi_token_prediction else (1.0,)
