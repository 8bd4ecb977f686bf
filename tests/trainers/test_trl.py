"""The adapter on TRL's own trainer: uniform credit is plain TRL to the bit, gamma is that of rlattn's own forward."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlattn.config import ConfigError, CreditConfig, HeadsConfig, SignalsConfig
from rlattn.credit import PackedResponses, assign_packed
from rlattn.kernels import Capture, StatisticsOptions, capture_layers, register
from rlattn.signals import SignalRows, reduce_signals
from tests.make import tiny_qwen3

pytestmark = pytest.mark.slow

SEED, EOS = 3, 2
PROMPTS = ["w3 w4 w5", "w6 w7 w8 w9 w10", "w11 w12", "w13"]
TRAINING = {"forward": "train", "heads": {"scope": "sequence"}, "fai_low": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than they give at this size, above all where others want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenizer():
    words = {"<unk>": 0, "<pad>": 1, "<eos>": EOS} | {f"w{i}": i for i in range(3, 50)}
    whole = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def variety(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


def model(**changes):
    """Ends are likely, so that completions differ in length."""
    made = tiny_qwen3(num_hidden_layers=6, eos_token_id=EOS, pad_token_id=1, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        made.lm_head.weight[EOS] = made.lm_head.weight.mean(0)
    return made


def make(kind, tmp_path, *, policy=None, options=None, **keywords):
    from trl import GRPOConfig

    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 20,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": SEED,
    }
    return kind(
        policy or model(),
        variety,
        args=GRPOConfig(**settings | (options or {})),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(),
        **keywords,
    )


def trained(*args, **keywords):
    trainer = make(*args, **keywords)
    trainer.train()
    return trainer


def lines(trainer):
    """What was logged of each step, without times and what only credit has."""
    foreign = ("credit/", "signals/", "step_time", "train_")
    return [{k: v for k, v in line.items() if not k.startswith(foreign)} for line in trainer.state.log_history]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def credited():
    from rlattn.trainers.trl import CreditGRPOTrainer

    return CreditGRPOTrainer


def plain():
    from trl import GRPOTrainer

    return GRPOTrainer


@pytest.mark.parametrize(
    ("options", "signals"),
    [
        ({}, None),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "num_iterations": 2, "beta": 0.1}, None),
        ({"gradient_accumulation_steps": 2, "importance_sampling_level": "sequence", "loss_type": "grpo"}, TRAINING),
    ],
    ids=["extra-forward", "own-forward", "training-forward"],
)
def test_uniform_credit_is_plain_trl_to_the_bit(tmp_path, options, signals):
    shape = {"attention_dropout": 0.1} if not options.get("beta") else {}  # as a drawn number more would show
    expected = trained(plain(), tmp_path, policy=saved(tmp_path, **shape), options=options)
    keywords = {"policy": saved(tmp_path, **shape), "credit": {"name": "uniform"}, "signals": signals}
    actual = trained(credited(), tmp_path, options=options, **keywords)
    assert lines(actual) == lines(expected)
    assert all(torch.equal(tensor, weights(expected)[name]) for name, tensor in weights(actual).items())
    logged = actual.state.log_history[0]
    assert logged["credit/mean_gamma"] == 1
    assert logged["credit/amplified_share"] == 0
    assert {"signals/waad_mean", "signals/fai_top_share", "signals/sink_mass/2", "signals/attention_entropy/4"} <= set(
        logged
    )


def saved(folder, **changes):
    """A model that TRL can load again, as it does for the reference."""
    model(**changes).save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def spying():
    class Spying(credited()):
        """Keeps what it was told."""

        def _shaped(self, listener, batch):
            self.shaped = super()._shaped(listener, batch)
            self.plain, self.batch, self.listener = batch["advantages"], batch, listener
            return self.shaped

    return Spying


def sequences(batch):
    """Prompt and completion of each row, without padding."""
    rows = zip(*(batch[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")), strict=True)
    return [(prompt[a.bool()], completion[b.bool()]) for prompt, a, completion, b in rows]


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_gamma_is_that_of_a_packed_forward(tmp_path, scope):
    """Own model, own attention, own packing: what rlattn's policy does with the same tokens."""
    heads, credit = HeadsConfig(scope=scope), CreditConfig()
    signals = SignalsConfig(heads=heads, fai_low=2)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    policy = saved(tmp_path)
    trainer = make(spying(), tmp_path, policy=policy, options=options, credit=credit, signals=signals)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS[:2] for _ in range(4)])

    rows = sequences(batch)
    assert len({len(completion) for _, completion in rows}) > 2
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=register())
    lengths = torch.tensor([len(prompt) + len(completion) for prompt, completion in rows])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    starts = cu_seqlens[:-1] + torch.tensor([len(prompt) for prompt, _ in rows])
    layers = capture_layers(packed.config)
    capture = Capture(layers, StatisticsOptions(fai_low=2), starts)
    ids = torch.cat([part for row in rows for part in row])
    position = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        logits = packed(
            input_ids=ids[None], position_ids=position[None], use_cache=False, cu_seqlens=cu_seqlens, capture=capture
        ).logits[0]
    logp = logits[:-1].log_softmax(-1)
    columns = {"logps": logp.gather(1, ids[1:, None])[:, 0], "entropy": -(logp.exp() * logp).sum(-1)}
    columns = {name: torch.cat([column.new_zeros(1), column]) for name, column in columns.items()}
    measured = SignalRows.collect(capture.statistics, layers, cu_seqlens, starts)
    columns |= reduce_signals([measured], heads).columns[0]
    responses = PackedResponses(starts, cu_seqlens[1:], range(8), trainer.plain)
    gamma, _ = assign_packed(columns, responses, credit, seed=SEED, step=0)

    heard = trainer.listener.heard
    reduced = reduce_signals([h.rows for h in heard], heads).columns
    own = [h.columns | part for h, part in zip(heard, reduced, strict=True)]
    response = torch.cat([torch.arange(a, b) for a, b in zip(starts, cu_seqlens[1:], strict=True)])
    for name, column in columns.items():
        actual = torch.cat([part[name] for part in own])
        torch.testing.assert_close(actual[response], column[response], rtol=1e-4, atol=1e-5, msg=name)
    assert (trainer.plain != 0).all()
    paid = (batch["advantages"] / trainer.plain[:, None])[batch["completion_mask"].bool()]
    # a near tie may be rounded the other way
    assert ((paid - gamma[response]).abs() < 1e-5).float().mean() > 0.97
    assert (paid > 1.2).float().mean() == pytest.approx(0.4, abs=0.1)


def test_accumulation_changes_nothing(tmp_path):
    """Heads are grouped over the whole batch, whatever the micro-batches are."""
    one = trained(credited(), tmp_path, options={"max_steps": 1})
    two = trained(
        credited(),
        tmp_path,
        options={"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    )
    for name in ("credit/mean_gamma", "signals/waad_mean", "signals/sink_mass/2", "grad_norm"):
        assert two.state.log_history[0][name] == pytest.approx(one.state.log_history[0][name], rel=1e-3), name
    assert one.state.log_history[0]["credit/mean_gamma"] > 1.1


def test_the_training_forward_pays_what_a_scoring_forward_does(tmp_path):
    score, train = (
        trained(credited(), tmp_path, options={"max_steps": 1}, signals=TRAINING | {"forward": forward})
        for forward in ("score", "train")
    )
    for name in ("loss", "grad_norm", "credit/mean_gamma", "signals/waad_mean"):
        assert train.state.log_history[0][name] == pytest.approx(score.state.log_history[0][name], rel=1e-3, abs=1e-5)


def test_calibrated_groups_are_measured_anew_every_so_many_batches(tmp_path):
    signals = {"forward": "train", "heads": {"scope": "calibrated", "refresh_steps": 2}, "fai_low": 2}
    trainer = trained(credited(), tmp_path, options={"max_steps": 3}, signals=signals)
    measured = ["signals/attention_entropy/2" in line for line in trainer.state.log_history[:3]]
    assert measured == [True, False, True]
    assert all(line["credit/mean_gamma"] > 1.1 for line in trainer.state.log_history[:3])


def test_lora_learns_and_its_reference_is_not_captured(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )  # so the reference is another model
    trainer = make(spying(), tmp_path, options={"beta": 0.1, "max_steps": 1}, peft_config=config)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    logged = trainer.state.log_history[0]
    assert logged["kl"] > 0
    assert logged["credit/mean_gamma"] > 1.1
    trainer.model.load_state_dict(before, strict=False)
    own = torch.cat([h.columns["logps"] for h in trainer.listener.heard])
    with torch.no_grad():
        (prompt, completion), *_ = sequences(trainer.batch)
        logits = trainer.model(torch.cat([prompt, completion])[None]).logits[0].log_softmax(-1)
    expected = logits[len(prompt) - 1 : -1].gather(1, completion[:, None])[:, 0]
    torch.testing.assert_close(own[len(prompt) : len(prompt) + len(completion)], expected, rtol=1e-4, atol=1e-5)


def test_the_wrapper_keeps_the_trainers_own_ways(tmp_path):
    from rlattn.trainers.trl import CreditGRPOTrainer, with_credit

    class Halved(plain()):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) / 2

    assert with_credit() is CreditGRPOTrainer
    kind = with_credit(Halved)
    assert kind.__name__ == "CreditHalved"
    halved = trained(kind, tmp_path, options={"max_steps": 1})
    whole = trained(credited(), tmp_path, options={"max_steps": 1})
    assert halved.state.log_history[0]["grad_norm"] == pytest.approx(
        whole.state.log_history[0]["grad_norm"] / 2, rel=1e-4
    )
    with pytest.raises(ConfigError, match=r"with_credit\(.*dict.*accepted are trl.GRPOTrainer"):
        with_credit(dict)


def virtual_tokens():
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


def capped():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=50, num_hidden_layers=2, eos_token_id=EOS, **shape))


def apart():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2, eos_token_id=EOS))


def eager():
    made = model()
    made.set_attn_implementation("eager")
    return made


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"credit": {"nme": "uniform"}}, "unknown key `credit.nme`; did you mean `credit.name`?"),
        ({"credit": {"name": "nothing"}}, "`credit.name` = 'nothing'"),
        ({"signals": 5}, "`signals` = 5"),
        ({"signals": {"layers": [99]}}, r"`signals.layers` = \[99\].*full_attention layers"),
        ({"signals": TRAINING, "options": {"num_iterations": 2}}, "num_iterations=2.*accepted is 'score'"),
        ({"options": {"torch_compile": True}}, "`torch_compile` = True.*accepted is False"),
        ({"peft_config": virtual_tokens}, "PromptTuningConfig.*accepted.*LoraConfig"),
        ({"policy": capped}, "Gemma2ForCausalLM: `attn_logit_softcapping` = 50.*accepted is a model without"),
        ({"policy": apart}, "BloomForCausalLM: it does not use transformers' attention interface; accepted"),
        ({"policy": eager}, "attn_implementation='eager'.*accepted: .*sdpa"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_work_is_refused_at_the_door(tmp_path, keywords, message):
    keywords = {name: value() if callable(value) else value for name, value in keywords.items()}
    with pytest.raises(ConfigError, match=message):
        make(credited(), tmp_path, **keywords)


def test_completions_that_others_wrote_into_are_refused(tmp_path):
    def rollout(prompts, trainer):
        said = {
            "prompt_ids": [3, 4],
            "completion_ids": [5, 6, EOS],
            "logprobs": [-1.0, -1.0, -1.0],
            "env_mask": [1, 0, 1],
        }
        return {name: [value] * len(prompts) for name, value in said.items()}

    trainer = make(credited(), tmp_path, rollout_func=rollout)
    with pytest.raises(ValueError, match=r"`env_mask`.*leave `env_mask` out"):
        trainer.train()


def test_the_script_of_the_docs_runs(tmp_path, monkeypatch):
    script = re.search(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/trl.md").read_text(), re.DOTALL)[1]
    assert len([line for line in script.splitlines() if line]) <= 15
    made = model()
    made.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    script = script.replace("Qwen/Qwen3-0.6B", str(tmp_path / "model"))
    script = script.replace('"runs/trl", ', f"{str(tmp_path)!r}, bf16=False, use_cpu=True, report_to='none', ")
    namespace = {}
    exec(script, namespace)
    assert namespace["trainer"].state.log_history[0]["credit/mean_gamma"] > 1.1


RANK = """
import os, sys, torch
from datasets import Dataset
from trl import GRPOConfig
from rlattn.trainers.trl import CreditGRPOTrainer

torch.set_num_threads(1)
folder = sys.argv[1]

class Spying(CreditGRPOTrainer):
    def _shaped(self, listener, batch):
        self.rows = [heard.rows for heard in listener.heard]
        return super()._shaped(listener, batch)

trainer = Spying(
    folder + "/model",
    lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
    GRPOConfig(
        folder + "/out", max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=20,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, learning_rate=1e-2,
    ),
    Dataset.from_dict({"prompt": ["w3 w4 w5", "w6 w7 w8 w9"]}),
)
trainer.train()
weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
said = (trainer.rows, trainer._groups, weights, trainer.state.log_history[0])
torch.save(said, f"{folder}/rank{os.environ['RANK']}.pt")
"""


def test_ranks_group_heads_together(tmp_path):
    saved(tmp_path)
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rank.py").write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, "-P", *launch, tmp_path / "rank.py", tmp_path],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=False) for i in range(2)]
    pooled = reduce_signals([rows for rank in ranks for rows in rank[0]], HeadsConfig()).groups.tolist()
    alone = [reduce_signals(rank[0], HeadsConfig()).groups.tolist() for rank in ranks]
    assert alone != [pooled, pooled]  # or the ranks' groups would show nothing
    assert [groups for _, groups, _, _ in ranks] == [pooled, pooled]
    assert all(torch.equal(tensor, ranks[1][2][name]) for name, tensor in ranks[0][2].items())
    assert ranks[0][3]["credit/mean_gamma"] == ranks[1][3]["credit/mean_gamma"] > 1.1
