"""Writing: greedy, drawn, streamed, as a conversation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from samv2.common.errors import ConfigError, DataError, ModelError
from samv2.federated.generation import (
    DENSE,
    EXPERT,
    Decoding,
    chat_ids,
    continue_text,
    decode,
    end_tokens,
    load_writers,
    prompt_ids,
)
from samv2.models.expert_model import ExpertModel
from tests.federated.runs import quiet
from tests.helpers import logits_of, stir

PROMPT = "def parse_args(self, args=None, namespace=None):\n"


def test_greedy_is_what_hugging_face_generates(
    tiny_expert_model: ExpertModel,
    tiny_llama_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = prompt_ids(tiny_tokenizer, PROMPT)
    dense = LlamaForCausalLM.from_pretrained(tiny_llama_folder).eval()
    for model in (stir(tiny_expert_model), dense):
        made = list(decode(model, ids, Decoding(max_new_tokens=24), ends=frozenset()))
        expected = model.generate(
            ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert len(made) == 24 and made == expected[0, ids.shape[1] :].tolist()


def test_each_token_is_the_likeliest_after_all_before(
    tiny_expert_model: ExpertModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, ids = stir(tiny_expert_model), prompt_ids(tiny_tokenizer, PROMPT)
    made = list(decode(model, ids, Decoding(max_new_tokens=12), ends=frozenset()))
    whole = torch.cat([ids, torch.tensor([made])], dim=1)
    wanted = logits_of(model, whole)[0, ids.shape[1] - 1 : -1].argmax(dim=1)
    assert made == wanted.tolist()


def test_draws_repeat_by_their_seed_and_leave_the_global_one(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = prompt_ids(tiny_tokenizer, PROMPT)
    before = torch.get_rng_state()
    drawn = [
        list(
            decode(
                tiny_llama,
                ids,
                Decoding(max_new_tokens=20, temperature=heat, seed=seed),
                ends=frozenset(),
            )
        )
        for heat, seed in ((1.0, 1), (1.0, 1), (1.0, 2), (1e-6, 1), (0.0, 1))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[3] == drawn[4]


def test_text_comes_in_pieces_that_add_up(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    pieces: list[str] = []
    hot = Decoding(max_new_tokens=40, temperature=3.0, seed=3)  # broken characters too
    made = continue_text(
        tiny_llama,
        tiny_tokenizer,
        prompt_ids(tiny_tokenizer, PROMPT),
        hot,
        pieces.append,
    )
    assert "".join(pieces) == made.text and len(pieces) > 3
    assert 1 <= made.tokens <= 40 and made.seconds > 0


def test_an_end_token_ends_the_text_and_is_not_shown(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = prompt_ids(tiny_tokenizer, PROMPT)
    made = list(decode(tiny_llama, ids, Decoding(max_new_tokens=9), ends=frozenset()))
    stopped = decode(
        tiny_llama, ids, Decoding(max_new_tokens=9), ends=frozenset({made[4]})
    )
    assert list(stopped) == made[: made.index(made[4])]
    tiny_llama.config.eos_token_id = [7, 9]
    assert end_tokens(tiny_llama, tiny_tokenizer) == {0, 7, 9}
    tiny_llama.config.eos_token_id = None
    assert end_tokens(tiny_llama, tiny_tokenizer) == {0}


def test_the_context_is_the_limit(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = torch.randint(1, 512, (1, 509), generator=torch.Generator().manual_seed(0))
    assert len(list(decode(tiny_llama, ids, Decoding(), ends=frozenset()))) == 3
    full = torch.cat([ids, ids[:, :3]], dim=1)
    with pytest.raises(DataError, match="512 tokens, the model's context is 512"):
        list(decode(tiny_llama, full, Decoding(), ends=frozenset()))
    with pytest.raises(DataError, match="prompt is empty"):
        prompt_ids(tiny_tokenizer, "")


def test_a_conversation_needs_a_template(
    tiny_llama_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    said = [{"role": "user", "content": "import"}]
    with pytest.raises(ModelError, match="no chat template; leave out --chat"):
        chat_ids(tiny_tokenizer, said)
    own = load_writers(str(tiny_llama_folder), console=quiet()).tokenizer
    own.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert own.decode(chat_ids(own, said)[0]) == "<user>import<assistant>"


def test_all_faults_of_the_decoding_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        Decoding(max_new_tokens=0, temperature=float("nan"), seed=-1)
    assert len(caught.value.faults) == 3


def test_writers_of_every_kind(expert_folder: Path, tiny_llama_folder: Path) -> None:
    dense = load_writers(str(tiny_llama_folder), console=quiet())
    assert list(dense.models) == [DENSE]
    both = load_writers(
        str(expert_folder), experts_per_token=8, side_by_side=True, console=quiet()
    )
    assert list(both.models) == [DENSE, EXPERT]
    # With every expert visited, the two write the same.
    ids = prompt_ids(both.tokenizer, PROMPT)
    few = Decoding(max_new_tokens=8)
    made = [
        continue_text(m, both.tokenizer, ids, few).text for m in both.models.values()
    ]
    assert made[0] == made[1] != ""
    for options in ({"experts_per_token": 4}, {"side_by_side": True}):
        with pytest.raises(ModelError, match="has no experts"):
            load_writers(str(tiny_llama_folder), console=quiet(), **options)
