"""The training loop: the core's batches, schedule and checkpoints around the C library's model."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from llmkit.gpt2 import from_llmc, hf_weights, to_llmc
from llmkit.recipe import learning_rate_at, model_config
from llmkit.trainer import Evaluation, Event, Finished, Note, Sample, Started, Step, TrainJob, Validation, due
from llmkit_llmc.build import build
from llmkit_llmc.library import AdamW, Library, LlmcError, Model, load
from llmkit_llmc.state import Comm, State

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8
PEAK_SECONDS = 0.05  # that measuring the processor's peak may take


class Training:
    """One run in this process: model, data and where they stand. `comm` is None unless it is one of several."""

    def __init__(self, job: TrainJob, comm: Comm | None = None) -> None:
        """Raises BuildError without a usable compiler, and ValueError where the start or its state does not fit."""
        self.job, self.config = job, job.config
        self.library: Library = load(mpi=comm is not None)
        self.comm = comm or Comm(rank=0, ranks=1)
        if job.start is not None:
            shape, weights = hf_weights(job.start)
        else:
            shape, weights = model_config(self.config, job.data.vocab_size), None
        self.threads = self.config.threads or max(1, (os.cpu_count() or 1) // self.comm.ranks)
        self.model = Model(
            self.library,
            shape,
            dtype=self.config.dtype,
            threads=self.threads,
            recompute=self.config.recompute,
            master=self.config.master_weights,
            rank=self.comm.rank,
            ranks=self.comm.ranks,
        )
        if weights is None:
            self.model.initialise(self.config.seed)
        else:
            self.model.load_arrays(to_llmc(weights, shape))
        self.batches = job.batches(rank=self.comm.rank, world=self.comm.ranks)
        self.micro_tokens: int = self.config.batch_size * self.config.sequence_length
        self.micro_batches: int = self.config.total_batch_tokens // (self.micro_tokens * self.comm.ranks)
        self.state = State(rng=self.config.seed * 2 + 1)
        if job.resume and job.start is not None:
            self._restore()

    @property
    def step(self) -> int:
        return int(self.state.step)

    def run(self) -> Iterator[Event]:
        """The events of the run, in order."""
        c, first, last_val = self.config, self.step, None
        yield from self._started()
        while True:
            stop = self.comm.any(self.library, self.job.stop.is_set())
            if due(self.step, c.val_every, c.steps) and (self.step > first or not self.job.resume):
                last_val = self.validate()
                yield Validation(self.step, last_val)
                if c.hellaswag and self.step:
                    yield self._hellaswag()
            if self.step > first and c.sample_every and due(self.step, c.sample_every, c.steps):
                yield Sample(self.step, self.sample())
            if self.step > first and (stop or due(self.step, c.checkpoint_every, c.steps)):
                yield self._save(last_val)
            if stop or self.step >= c.steps:
                break
            yield self.train_step()
        yield Finished(self.step, interrupted=stop and self.step < c.steps)
        self.model.close()

    @property
    def fused(self) -> bool:
        """Are weights updated inside the backward? Not where the update must know more than one batch's gradient."""
        c = self.config
        whole = self.micro_batches == 1 and self.comm.ranks == 1
        return whole and c.grad_clip == 0 and c.skip_loss == 0 and c.skip_norm == 0

    def train_step(self) -> Step:
        """Forward and backward over the micro-batches, exchange, clip, update."""
        began = time.perf_counter()
        c, lib, state, step = self.config, self.library, self.state, self.step
        if c.overfit:
            self.batches.position = 0
        scale, total = 1.0 / c.total_batch_tokens, 0.0
        rate, seed = learning_rate_at(step, c), state.next_seed()
        how = AdamW(rate, BETA1, BETA2, EPSILON, c.weight_decay, 1.0, step + 1, seed)
        if self.fused:
            loss, square = self.model.step(*next(self.batches), how, scale=scale)
            norm = math.sqrt(square)
        else:
            for index in range(self.micro_batches):
                inputs, targets = next(self.batches)
                total += self.model.gradient(inputs, targets, scale=scale, accumulate=index > 0)
            loss = self.comm.sum(lib, total / self.micro_batches) / self.comm.ranks
            self.comm.reduce_gradients(lib, self.model)
            lo, hi = self.comm.share(self.model.count)
            norm = math.sqrt(self.comm.sum(lib, self.model.grad_square(lo, hi)))
        outlier = state.is_outlier(lib, loss, norm, c.skip_loss, c.skip_norm)
        if not self.fused and math.isfinite(norm) and not outlier:
            how.grad_scale = c.grad_clip / norm if 0 < c.grad_clip < norm else 1.0
            self.model.update(how)
            self.comm.gather_params(lib, self.model)
        state.step = step + 1
        return Step(step, loss, rate, norm, c.total_batch_tokens, time.perf_counter() - began, skipped=outlier)

    def validate(self) -> float:
        """Mean loss in nats per token over the job's validation batches; the processes take turns at them."""
        total = 0.0
        for index, (inputs, targets) in enumerate(self.job.validation):
            if index % self.comm.ranks == self.comm.rank:
                total += self.model.loss(inputs, targets)[0]
        return self.comm.sum(self.library, total) / len(self.job.validation)

    def sample(self) -> str:
        """Text from the prompt on, up to an end of text; the seed follows the step, so a resumed run shows the same."""
        c, tokenizer = self.config, self.job.data.tokenizer
        end = tokenizer.eot_id
        prompt = tokenizer.encode(c.prompt) if c.prompt else [0 if end is None else end]
        if len(prompt) >= self.model.shape.context:
            raise ValueError(
                f"--prompt has {len(prompt)} tokens, and the model only {self.model.shape.context} positions"
            )
        ids = self.model.generate(prompt, c.sample_tokens, temperature=c.temperature, top_k=c.top_k, seed=self.step)
        if end in ids:
            ids = ids[: ids.index(end)]
        return c.prompt + tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])

    def _started(self) -> Iterator[Event]:
        shape, c = self.model.shape, self.config
        peak = self.library.llmc_machine_peak(self.threads, int(c.dtype == "bf16"), ctypes.c_double(PEAK_SECONDS))
        yield Started(
            step=self.step,
            parameters=shape.parameters,
            flops_per_token=shape.flops_per_token(c.sequence_length),
            peak_flops=peak * self.comm.ranks,
            device=f"cpu ({self.library.description}; {self.comm.ranks} x {self.threads} threads), {c.dtype}",
        )
        for note in build(mpi=self.comm.ranks > 1).notes:
            yield Note(note)

    def _hellaswag(self) -> Evaluation:
        from llmkit_llmc.hellaswag import evaluation_file

        path = evaluation_file(Path(self.config.hellaswag), self.job.data.tokenizer)
        correct, examples = ctypes.c_int32(), ctypes.c_int32()
        sizes = (self.config.batch_size, self.config.sequence_length, self.comm.rank, self.comm.ranks)
        counts = ctypes.byref(correct), ctypes.byref(examples)
        self.library.call("llmc_eval_run", os.fsencode(path), self.model.handle, *sizes, *counts)
        right = round(self.comm.sum(self.library, correct.value))
        # llm.c takes the ending of the lowest mean loss per token; lm-eval's acc_norm divides by bytes instead
        return Evaluation(self.step, "hellaswag", "acc_norm", right / examples.value, examples.value)

    def _save(self, val_loss: float | None) -> Event:
        def write_state(folder: Path) -> None:
            self.state.write(self.library, self.model, folder, self.comm.rank, position=self.batches.position)

        shape = self.model.shape
        weights = from_llmc(self.model.split(self.model.get()), shape)
        config = shape.to_hf(eot_id=self.job.data.eot_id)
        return self.job.save(self.step, config=config, weights=weights, write_state=write_state, val_loss=val_loss)

    def _restore(self) -> None:
        assert self.job.start is not None and self.job.start.trainer_state is not None
        folder = self.job.start.trainer_state
        try:
            self.batches.position = self.state.read(self.library, self.model, folder, self.comm)
        except (OSError, LlmcError) as error:
            raise ValueError(f"the run cannot be resumed: {error}") from None
