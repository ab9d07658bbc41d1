"""The training loop: dispatch step k, read the metrics of step k-1, never wait in between."""

import dataclasses
import json
import math
from pathlib import Path

import jax

from flexmemory.config import Config
from flexmemory.data import tokenizer as tokenizers
from flexmemory.data.pipeline import make_batches
from flexmemory.data.prefetch import prefetch
from flexmemory.data.shards import TokenShards, read_questions
from flexmemory.errors import UserError
from flexmemory.evals.perplexity import make_eval_step, perplexity
from flexmemory.evals.questions import answer_accuracy, encode_questions
from flexmemory.models.accounting import account, train_flops_per_token
from flexmemory.progress import ProgressLine
from flexmemory.train import checkpoint
from flexmemory.train.clock import Clock, peak_flops
from flexmemory.train.run import Writer, claim, write_atomic
from flexmemory.train.step import init_state, make_train_step


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is not finite. The message names the step and the last good checkpoint."""


def resolve(cfg: Config) -> tuple[Config, TokenShards, TokenShards]:
    """(config with the data's vocabulary filled in, train shards, validation shards). Raises UserError when they do not fit."""
    if not cfg.data.path:
        raise UserError("config data.path: empty; give a directory written by `flexmemory prepare`")
    train, val = TokenShards(cfg.data.path, "train"), TokenShards(cfg.data.path, "val")
    if not cfg.model.vocab_size:
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=train.vocab_size))
    if cfg.model.vocab_size < train.vocab_size:
        raise UserError(f"config model.vocab_size: {cfg.model.vocab_size} is smaller than the data's vocabulary {train.vocab_size}; "
                        "set it to that or to 0")
    train.num_windows(cfg.data.seq_len), val.num_windows(cfg.data.seq_len)  # raises when a sequence is longer than a shard
    return cfg, train, val


def train(cfg: Config, workdir: str | Path, progress: bool = True) -> dict:
    """Trains (or resumes) a run and returns what final_result.json holds. Raises UserError, TrainingDiverged."""
    workdir, clock = Path(workdir), Clock()
    with clock.span("setup"):
        cfg, shards, val_shards = resolve(cfg)
        encode_questions(read_questions(cfg.data.path), tokenizers.load(cfg.data.path), cfg.data.seq_len)  # raises when one is too long
        claim(workdir, cfg, shards.fingerprint, Path(cfg.data.path))
        batches = make_batches(shards, seq_len=cfg.data.seq_len, batch_size=cfg.data.batch_size, seed=cfg.train.seed,
                               accum=cfg.train.accum_steps, segments=cfg.data.document_mask)
        checkpoints = checkpoint.open_checkpoints(workdir, cfg.train.keep_checkpoints)
        state = checkpoint.restore(checkpoints, workdir, cfg)
        start = int(state["step"]) if state else 0
        state = state or init_state(cfg)
        run = Run(cfg, workdir, clock, checkpoints, val_shards, progress, start)
    try:
        state = run.steps(state, batches)
        return run.finish(state)
    finally:
        run.writer.close()
        checkpoints.close()


class Run:
    """One call of :func:`train`: what the loop carries besides the train state."""

    def __init__(self, cfg: Config, workdir: Path, clock: Clock, checkpoints, val_shards: TokenShards, progress: bool, start: int):
        self.cfg, self.workdir, self.clock, self.checkpoints, self.val_shards = cfg, workdir, clock, checkpoints, val_shards
        self.progress, self.start, self.saved = progress, start, start
        self.step_fn, self.eval_step, self.compiled = make_train_step(cfg), make_eval_step(cfg), {}
        self.writer = Writer(workdir, start, cfg.train.tensorboard)
        self.numbers = account(cfg.model, cfg.data.seq_len)
        self.tokens_per_step = cfg.data.batch_size * cfg.data.seq_len
        self.peak = peak_flops()
        self.timed_tokens, self.timed_seconds, self.rows = 0, 0.0, 0.0
        self.window = None  # (step, working seconds) at the start of the interval that the next log line covers

    def steps(self, state: dict, batches) -> dict:
        cfg, pending = self.cfg, None
        with ProgressLine("train", cfg.train.steps, "steps", self.progress, start=self.start) as line, \
                prefetch(batches, self.start, cfg.train.steps) as stream:
            for step in range(self.start, cfg.train.steps):
                with self.clock.span("data_wait"):
                    batch = next(stream)
                self.rows = batch["unique_ids"].shape[1] / batch["ids"][0].size
                run_step = self._compiled(state, batch)
                state, metrics = run_step(state, batch)
                if pending:
                    self._log(line, *pending)
                pending = (step + 1, metrics)
                if self._due(cfg.train.eval_every, step + 1) or self._due(cfg.train.checkpoint_every, step + 1):
                    self._log(line, *pending)  # waits for the step: an evaluation or a checkpoint must be of a sound state
                    pending = None
                    if self._due(cfg.train.eval_every, step + 1):
                        self._evaluate(state, step + 1)
                    if self._due(cfg.train.checkpoint_every, step + 1):
                        self._save(state, step + 1)
            if pending:
                self._log(line, *pending)
        return state

    def finish(self, state: dict) -> dict:
        """Final evaluation, checkpoint and result."""
        cfg, steps = self.cfg, self.cfg.train.steps
        if self.saved < steps or not checkpoint.complete_steps(self.workdir):
            self._save(state, steps)
        with self.clock.span("checkpoint"):
            self.checkpoints.wait()
        with self.clock.span("eval"):
            result = perplexity(cfg, state["params"], self.val_shards, self.eval_step)
            tokenizer = tokenizers.load(self.workdir)
            answers = answer_accuracy(cfg, state["params"], tokenizer, read_questions(cfg.data.path))
        final = {
            "step": steps, "tokens": steps * self.tokens_per_step,
            **{f"val_{name}": value for name, value in result.items()}, **answers,
            "train_tokens_per_s": self.timed_tokens / self.timed_seconds if self.timed_seconds else None,
            "mfu": self._mfu(self.timed_tokens / self.timed_seconds) if self.timed_seconds else None,
            "rows_per_token": self.rows, "seconds": {**self.clock.seconds, "total": self.clock.elapsed()},
            "resumed_from": self.start, "accounting": self.numbers,
        }
        self.writer.write(steps, {f"val_{name}": value for name, value in result.items()})
        write_atomic(self.workdir / "final_result.json", json.dumps(final, indent=2))
        return final

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and step % every == 0 and step < self.cfg.train.steps

    def _compiled(self, state, batch):
        """The train step compiled for the batch's shapes; R takes one of a few static sizes, so this compiles once or twice."""
        shapes = batch["unique_ids"].shape
        if shapes not in self.compiled:
            with self.clock.span("compile"):
                self.compiled[shapes] = self.step_fn.lower(state, batch).compile()
            self.window = None
        return self.compiled[shapes]

    def _log(self, line: ProgressLine, step: int, metrics: dict) -> None:
        """Reads one step's metrics (this waits for that step only), checks them, and writes every log_every-th."""
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if bad := [f"{name} {numbers[name]}" for name in ("loss", "grad_norm", "param_norm") if not math.isfinite(numbers[name])]:
            self.checkpoints.wait()
            good = checkpoint.complete_steps(self.workdir)
            raise TrainingDiverged(f"step {step}: {', '.join(bad)}; last good checkpoint: "
                                   f"{self.workdir / 'checkpoints' / str(good[-1]) if good else 'none yet'}")
        now = self.clock.working()
        if self.window is None:  # the first step after a compilation starts the clock and is not timed
            self.window = (step, now)
        if step % self.cfg.train.log_every and step != self.cfg.train.steps:
            line.update(step)
            return
        since, began = self.window
        if step > since:
            rate = (step - since) * self.tokens_per_step / (now - began)
            self.timed_tokens += (step - since) * self.tokens_per_step
            self.timed_seconds += now - began
            self.window = (step, now)
            numbers |= {"tokens_per_s": rate, "mfu": self._mfu(rate)}
        numbers |= {"tokens": step * self.tokens_per_step, "rows_per_token": self.rows,
                    "data_wait_s": self.clock.seconds["data_wait"], "compile_s": self.clock.seconds["compile"]}
        self.writer.write(step, numbers)
        rate, mfu = numbers.get("tokens_per_s"), numbers.get("mfu")
        line.update(step, f"loss {numbers['loss']:.4f}" + (f"  {rate:,.0f} tokens/s" if rate else "")
                    + f"  MFU {f'{mfu:.1%}' if mfu else 'unknown'}")

    def _mfu(self, tokens_per_s: float) -> float | None:
        """Model FLOPs really done over the devices' bfloat16 peak; None on a device without a known peak."""
        if self.peak is None:
            return None
        return tokens_per_s * train_flops_per_token(self.numbers, self.rows) / (self.peak * jax.device_count())

    def _evaluate(self, state, step: int) -> None:
        with self.clock.span("eval"):
            result = perplexity(self.cfg, state["params"], self.val_shards, self.eval_step)
        self.writer.write(step, {f"val_{name}": value for name, value in result.items()})

    def _save(self, state, step: int) -> None:
        with self.clock.span("checkpoint"):
            checkpoint.save(self.checkpoints, step, state, step * self.tokens_per_step)
        self.saved = step
