"""MEAP around other collators: clean labels, protected tokens, copies of answers, mask tokens that fit."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from weightsmith.errors import InputError
from weightsmith.testbed import write_model_folder
from weightsmith.testbed.alphabet import EOS, PAD, VOCABULARY
from weightsmith.training import DataCollatorForMEAP, meap_sft_map, resolve_mask_token, strip_mask_token
from weightsmith.training.meap.answers import document_starts, find_answers
from weightsmith.training.meap.copies import weighted_loss
from weightsmith.training.meap.masking import authors_places

MASK = VOCABULARY["<mask>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return PreTrainedTokenizerFast.from_pretrained(write_model_folder("xs", tmp_path_factory.mktemp("bed")))


@pytest.fixture
def bare(tokenizer):
    """The same tokenizer without a mask token."""
    found = copy.deepcopy(tokenizer)
    found.mask_token = None
    return found


def tiny(vocabulary=100, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # attention that matters
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def row(length, seed=0):
    return torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def pair(prompt, answer, seed=0):
    """A prompt and an answer with its end token, as a row of training."""
    ids = [*row(prompt + answer, seed), EOS]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [-100] * prompt + ids[prompt:],
    }


def padding(tokenizer, side="right"):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_base_collators_and_special_tokens_stay(tokenizer, side):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    base = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = [{"input_ids": [EOS, *row(length, length), EOS]} for length in (30, 12, 3)]
    clean, masked = base(rows), DataCollatorForMEAP(base, tokenizer, mask_ratio=0.5)(rows)
    assert torch.equal(masked["labels"], clean["labels"])
    hidden = masked["input_ids"] == MASK
    assert torch.equal(masked["input_ids"][~hidden], clean["input_ids"][~hidden])
    assert not hidden[(clean["input_ids"] == EOS) | (clean["input_ids"] == PAD)].any()
    # The last token that could be masked is not: half of 29, of 11 and of 2.
    assert hidden.sum(1).tolist() == [14, 5, 1]
    everything = DataCollatorForMEAP(base, tokenizer, mask_ratio=0.5, protect_special=False)(rows)
    assert (everything["input_ids"] == MASK).sum(1).tolist() == [15, 6, 2]


def test_labels_that_are_missing_are_clean_ids_without_padding_and_starts_of_documents():
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK, mask_ratio=0.4)
    ids = row(12)
    features = {"input_ids": ids, "attention_mask": [1] * 10 + [0] * 2}
    assert collator([features])["labels"].tolist() == [[*ids[:10], -100, -100]]
    features = {"input_ids": ids, "position_ids": [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5]}
    wanted = [-100 if place in (4, 6) else token for place, token in enumerate(ids)]
    assert collator([features])["labels"].tolist() == [wanted]


def test_packed_documents_keep_what_the_packing_collator_set(tokenizer):
    base = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    rows = [{"input_ids": row(length, length)} for length in (20, 7, 9)]
    clean, masked = base(rows), DataCollatorForMEAP(base, tokenizer, mask_ratio=0.3)(rows)
    assert (masked["input_ids"] == MASK).sum() == math.floor(0.3 * 35)
    for key, value in clean.items():
        if key != "input_ids":
            assert torch.equal(torch.as_tensor(masked[key]), torch.as_tensor(value)), key


def test_places_of_images_are_never_masked(tokenizer):
    collator = DataCollatorForMEAP(
        default_data_collator, tokenizer, mask_ratio=0.9, protect_special=False, protected_ids=[8]
    )
    collator.protect_placeholders(LlamaConfig(image_token_id=7))
    hidden = collator([{"input_ids": [5, 7, 7, 8] * 6}])["input_ids"] == MASK
    assert hidden.sum() == 4  # 90 % of 6, less the last that could be
    assert hidden[0].nonzero().remainder(4).eq(0).all()


def test_masks_follow_seed_epoch_content_and_position_and_nothing_else():
    def hidden(start=0, epoch=0, seed=0, position=None, calls=0):
        collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK, seed=seed)
        collator.set_epoch(epoch)
        for _ in range(calls):
            collator([{"input_ids": row(40, 99)}])
        batch = collator.clean([{"input_ids": row(40, start)}, {"input_ids": row(40, start)}])
        return collator.mask(batch, position)["input_ids"] == MASK

    assert torch.equal(hidden(), hidden(calls=5))
    assert not torch.equal(hidden()[0], hidden()[1])
    for other in ({"start": 1}, {"epoch": 1}, {"seed": 1}, {"position": (3, 0)}):
        assert not torch.equal(hidden(), hidden(**other))
    assert torch.equal(hidden(position=(3, 1)), hidden(position=(3, 1)))
    assert not torch.equal(hidden(position=(3, 1)), hidden(position=(3, 0)))


def test_the_authors_masks_are_one_for_all_rows_and_come_again(tokenizer):
    options = {"per_row": False, "protect_special": False, "seed_cycle": 51}
    collator = DataCollatorForMEAP(default_data_collator, tokenizer, **options)
    batch = collator.clean([{"input_ids": [EOS, *row(63, seed)]} for seed in range(3)])
    for step in (0, 7, 58):
        hidden = collator.mask(batch, (step, 1))["input_ids"] == MASK
        for line in hidden:
            assert line.nonzero().flatten().tolist() == sorted(authors_places(step, 64, 0.15))
    with pytest.raises(InputError, match="seed_cycle goes by steps"):
        collator.mask(batch)


def test_evaluation_is_clean():
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK)
    collator.eval()
    assert not (collator([{"input_ids": row(50)}])["input_ids"] == MASK).any()
    collator.train()
    assert (collator([{"input_ids": row(50)}])["input_ids"] == MASK).any()


def test_a_masked_input_changes_logits_from_its_place_on():
    model, ids = tiny(), torch.tensor([row(20)])
    other = ids.clone()
    other[0, 7] = MASK
    before, after = model(input_ids=ids).logits, model(input_ids=other).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("ratio", [0.0, 0.2])
def test_the_mask_row_learns_only_where_something_is_masked(ratio):
    model = tiny()
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK, mask_ratio=ratio)
    batch = collator([{"input_ids": row(20)}])
    model(**batch).loss.backward()
    assert bool(model.get_input_embeddings().weight.grad[MASK].any()) == (ratio > 0)
    if ratio == 0:
        ids = torch.tensor([row(20)])
        assert torch.equal(model(**batch).loss, model(input_ids=ids, labels=ids).loss)


# -- copies of answers


def test_a_copys_labels_are_the_masked_tokens_of_its_answer(tokenizer):
    rows = [pair(10, 60, 1), pair(5, 51, 2), pair(5, 50, 3)]
    collator = DataCollatorForMEAP(padding(tokenizer), tokenizer, mode="sft")
    clean, made = collator.clean(rows), collator(rows)
    assert made["input_ids"].shape == (5, 71)  # the answer of 50 tokens gets none
    for key, value in clean.items():
        assert torch.equal(made[key][:3], value), key
    for source, place, prompt, answer, count in ((0, 3, 10, 60, 6), (1, 4, 5, 51, 5)):
        ids, labels = made["input_ids"][place], made["labels"][place]
        hidden = ids == MASK
        assert hidden.sum() == count
        assert hidden.nonzero().min() >= prompt
        assert hidden.nonzero().max() < prompt + answer  # the end token stays
        assert torch.equal(labels != -100, hidden)
        assert torch.equal(labels[hidden], clean["input_ids"][source][hidden])
        assert torch.equal(ids[~hidden], clean["input_ids"][source][~hidden])
        assert torch.equal(made["attention_mask"][place], clean["attention_mask"][source])


def authors_rows(prompt, answer, places):
    """What the authors' preprocessing makes of one pair, given the places it draws in the answer."""
    ids = [*prompt, *answer, EOS]
    rows = [(ids, [-100] * len(prompt) + [*answer, EOS])]
    if len(answer) > 50:
        hidden, labels = list(ids), [-100] * len(ids)
        for place in places:
            hidden[len(prompt) + place] = MASK
            labels[len(prompt) + place] = answer[place]
        rows.append((hidden, labels))
    return rows


@pytest.mark.parametrize("answer", [40, 50, 51, 80])
def test_rows_are_those_of_the_authors_preprocessing(tokenizer, answer):
    whole = pair(6, answer)
    made = DataCollatorForMEAP(padding(tokenizer), tokenizer, mode="sft")([whole])
    places = (made["input_ids"][-1] == MASK).nonzero().flatten() - 6
    wanted = authors_rows(whole["input_ids"][:6], whole["input_ids"][6:-1], places.tolist())
    found = list(zip(made["input_ids"].tolist(), made["labels"].tolist(), strict=True))
    assert found == [(ids, labels) for ids, labels in wanted]


def test_each_turn_of_a_conversation_has_its_own_count_and_keeps_its_history(tokenizer):
    ids = [*row(5), *row(60, 1), EOS, *row(8, 2), *row(20, 3), EOS, *row(4, 4), *row(70, 5), EOS]
    labels = [-100] * 5 + ids[5:66] + [-100] * 8 + ids[74:95] + [-100] * 4 + ids[99:]
    features = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
    made = DataCollatorForMEAP(padding(tokenizer), tokenizer, mode="sft")([features])
    hidden = made["input_ids"][1] == MASK
    assert (hidden[5:65].sum(), hidden[74:95].sum(), hidden[99:169].sum()) == (6, 0, 7)
    assert hidden.sum() == 13
    assert torch.equal(made["input_ids"][1][~hidden], torch.tensor(ids)[~hidden])


def tool_call(texts=(30, 40), after=()):
    """An answer with a special token in its middle, two placeholders, and `after` behind its end token."""
    first, second = (row(count, count) for count in texts)
    ids = [*row(5), *first, EOS, *second[:7], 7, 7, *second[7:], EOS, *after]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * 5 + ids[5:]}


def test_special_tokens_and_placeholders_inside_an_answer_are_not_masked_and_dont_count(tokenizer):
    whole = tool_call(after=[11])
    text = 70 - row(30, 30).count(7) - row(40, 40).count(7) + 1
    for share, count in ((0.1, text // 10), (1.0, text)):
        collator = DataCollatorForMEAP(padding(tokenizer), tokenizer, mode="sft", mask_ratio=share)
        collator.protect_placeholders(LlamaConfig(image_token_id=7))
        clean, hidden = collator([whole])["input_ids"][0], collator([whole])["input_ids"][1] == MASK
        assert hidden.sum() == count
        assert not hidden[(clean == EOS) | (clean == 7)].any()
    columns = {key: [value] for key, value in whole.items()}
    made = meap_sft_map(columns, mask_token_id=MASK, protected_ids=[EOS, 7], mask_ratio=1.0)
    assert made["input_ids"][1][5:].tolist() == [
        token if token in (EOS, 7) else MASK for token in whole["input_ids"][5:]
    ]


def test_what_is_protected_decides_whether_an_answer_is_long(tokenizer):
    words = tool_call((20, 30))
    number = 50 - row(20, 20).count(7) - row(30, 30).count(7)

    def copies(least, **options):
        options = {"mode": "sft", "min_answer_tokens": least, **options}
        collator = DataCollatorForMEAP(padding(tokenizer), tokenizer, protected_ids=[7], **options)
        return collator([words])["input_ids"].shape[0] - 1

    assert (copies(number), copies(number + 1)) == (1, 0)
    assert (copies(number + 1, protect_special=False), copies(number + 2, protect_special=False)) == (1, 0)
    columns = {key: [words[key]] for key in ("input_ids", "labels")}
    for least, rows in ((number, 2), (number + 1, 1)):
        made = meap_sft_map(columns, mask_token_id=MASK, protected_ids={EOS, 7}, min_answer_tokens=least)
        assert len(made["input_ids"]) == rows


def test_special_tokens_of_an_answer_can_be_masked_but_the_one_that_closes_it(tokenizer):
    options = {"mode": "sft", "mask_ratio": 1.0, "protect_special": False}
    collator = DataCollatorForMEAP(padding(tokenizer), tokenizer, protected_ids=[7], **options)
    clean, hidden = collator([tool_call()])["input_ids"][0], collator([tool_call()])["input_ids"][1] == MASK
    assert hidden[5:].tolist() == [*(clean[5:-1] != 7).tolist(), False]


def test_answers_end_before_their_closing_token_and_never_begin_a_document():
    labels = np.array([1, 2, -100, 4, 9, 5, 6, 9])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    starts = np.flatnonzero(document_starts((1, 8), positions))
    is_answer, begins, ends = find_answers(labels, starts, closing={9})
    assert list(zip(begins, ends, strict=True)) == [(1, 2), (3, 4), (6, 7)]
    assert np.flatnonzero(is_answer).tolist() == [1, 3, 6]


def total(model, made):
    """Sum of the losses, as a Trainer takes it over a whole batch."""
    return model(**made, num_items_in_batch=1).loss.item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_copies_in_the_same_row_have_the_loss_of_copies_in_their_own(tokenizer, side):
    rows = [pair(4, 60, 1), pair(9, 20, 2), pair(3, 70, 3)]
    model, made = tiny(), {}
    for layout in ("separate", "concat", "concat_visible"):
        collator = DataCollatorForMEAP(padding(tokenizer, side), tokenizer, mode="sft", layout=layout)
        made[layout] = collator(rows)
    assert made["separate"]["input_ids"].shape[0] == 5
    assert made["concat"]["input_ids"].shape == (3, 148)
    labelled = {layout: int((batch["labels"] != -100).sum()) for layout, batch in made.items()}
    assert set(labelled.values()) == {61 + 21 + 71 + 6 + 7}
    found = {layout: total(model, batch) for layout, batch in made.items()}
    assert found["concat"] == pytest.approx(found["separate"], rel=1e-5)
    assert abs(found["concat_visible"] - found["separate"]) > 1e-3 * found["separate"]


def test_copies_of_flattened_rows_are_further_documents_with_the_same_loss(tokenizer):
    rows = [pair(4, 60, 1), pair(9, 20, 2), pair(3, 70, 3)]
    base = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    flat = DataCollatorForMEAP(base, tokenizer, mode="sft")(rows)
    documents = [65, 30, 74, 65, 74]
    assert flat["input_ids"].shape == (1, sum(documents))
    assert flat["cu_seq_lens_q"].tolist() == [0, *torch.tensor(documents).cumsum(0).tolist()]
    assert flat["cu_seq_lens_q"].dtype == torch.int32
    assert flat["max_length_q"] == 74
    assert flat["position_ids"][0].tolist() == [place for size in documents for place in range(size)]
    assert flat["seq_idx"][0].tolist() == [n for n, size in enumerate(documents) for _ in range(size)]
    model = tiny()
    model.config.use_cache = False
    together = model(
        input_ids=flat["input_ids"],
        labels=flat["labels"],
        position_ids=flat["position_ids"],
        num_items_in_batch=1,
    ).loss
    alone = 0.0
    for ids, labels in zip(
        flat["input_ids"][0].split(documents), flat["labels"][0].split(documents), strict=True
    ):
        alone += model(input_ids=ids[None], labels=labels[None], num_items_in_batch=1).loss.item()
    assert together.item() == pytest.approx(alone, rel=1e-5)


def test_a_padded_row_by_itself_is_no_row_of_documents(tokenizer):
    whole = pair(4, 60)
    padded = {key: [fill] * 3 + whole[key] for key, fill in (("input_ids", PAD), ("labels", -100))}
    padded |= {"attention_mask": [0] * 3 + whole["attention_mask"], "position_ids": [1] * 3 + list(range(65))}
    made = DataCollatorForMEAP(default_data_collator, tokenizer, mode="sft")([padded])
    assert made["input_ids"].shape == (2, 68)
    assert torch.equal(made["position_ids"][0], made["position_ids"][1])


def test_end_tokens_that_pad_too_stay_labels_where_nothing_says_what_they_are(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    ids = [*row(5), EOS, *row(5, 1), EOS]
    batch = DataCollatorForMEAP(default_data_collator, tokenizer)([{"input_ids": ids}])
    assert batch["labels"].tolist() == [ids]


def test_a_copys_weight_enters_numerator_and_denominator(tokenizer):
    collator = DataCollatorForMEAP(padding(tokenizer), tokenizer, mode="sft", copy_loss_weight=0.5)
    made = collator([pair(4, 60), pair(4, 10)])
    weights = made.pop("loss_weights")
    assert weights[:2].eq(1).all()
    assert weights[2].eq(0.5).all()
    logits = tiny()(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits
    total, count = 0.0, 0.0
    for line, labels, weight in zip(logits.double(), made["labels"], weights, strict=True):
        for place in range(1, len(labels)):
            if labels[place] != -100:
                total -= weight[place] * line[place - 1].log_softmax(-1)[labels[place]]
                count += weight[place]
    assert weighted_loss(logits, made["labels"], weights).item() == pytest.approx((total / count).item())
    short = collator([pair(4, 10)])
    assert short["loss_weights"].eq(1).all()


def test_a_data_set_gets_its_copies_once_and_for_all():
    rows = [pair(4, 60, 1), pair(9, 20, 2), pair(3, 70, 3)]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    made = meap_sft_map(columns, mask_token_id=MASK, protected_ids=[EOS], seed=1)
    np.testing.assert_equal(made, meap_sft_map(columns, mask_token_id=MASK, protected_ids=[EOS], seed=1))
    other = meap_sft_map(columns, mask_token_id=MASK, protected_ids=[EOS], seed=2)
    assert made["input_ids"][1].tolist() != other["input_ids"][1].tolist()
    assert [len(ids) for ids in made["input_ids"]] == [65, 65, 30, 74, 74]
    assert made["input_ids"][0].tolist() == rows[0]["input_ids"]
    assert made["labels"][2].tolist() == rows[1]["labels"]
    for number, clean, count in ((1, rows[0], 6), (4, rows[2], 7)):
        ids, labels = made["input_ids"][number].tolist(), made["labels"][number].tolist()
        places = [place for place, token in enumerate(ids) if token == MASK]
        assert len(places) == count
        assert max(places) < len(ids) - 1
        assert [place for place, label in enumerate(labels) if label != -100] == places
        assert all(labels[place] == clean["input_ids"][place] for place in places)
        assert made["attention_mask"][number] == clean["attention_mask"]
    empty = {"input_ids": [], "labels": []}
    assert meap_sft_map(empty, mask_token_id=MASK) == empty


@pytest.mark.parametrize("form", [None, "numpy", "torch"])
def test_copies_are_the_same_by_any_road_into_a_data_set(form):
    from datasets import Dataset

    rows = [pair(4, 60, 1), pair(9, 20, 2), pair(3, 70, 3)]
    wanted = meap_sft_map({key: [row[key] for row in rows] for key in rows[0]}, mask_token_id=MASK, seed=1)
    made = Dataset.from_list(rows).with_format(form)
    made = made.map(lambda some: meap_sft_map(some, mask_token_id=MASK, seed=1), batched=True)
    np.testing.assert_equal(made.with_format(None)[:], wanted)


def test_a_row_with_more_labels_than_ids_is_named():
    rows = {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4, 5]]}
    with pytest.raises(InputError, match="row 1 has 2 input_ids and 3 labels"):
        meap_sft_map(rows, mask_token_id=MASK)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({"input_ids": [[1]]}, {}, "needs a column `labels`; found: input_ids"),
        ({"input_ids": [[], [1.5]], "labels": [[], [1]]}, {}, "input_ids: expected integers, got float64"),
        (
            {"input_ids": [[1], [MASK, MASK]], "labels": [[1], [2, 3]]},
            {},
            f"mask token {MASK} is in the clean text, 2 times, first in row 1",
        ),
        ({"input_ids": [[1]], "labels": [[1]]}, {"layout": "concat"}, "layout changes nothing here"),
        ({"input_ids": [[1]], "labels": [[1]]}, {"mask_token_id": -3}, "mask_token_id must be at least 0"),
    ],
)
def test_what_copies_of_their_own_rows_cant_be_made_of_is_named(rows, options, message):
    with pytest.raises(InputError, match=message):
        meap_sft_map(rows, **{"mask_token_id": MASK, **options})


def test_labels_of_another_shape_are_named(tokenizer):
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "labels": torch.ones(2, 5, dtype=torch.long)}
    collator = DataCollatorForMEAP(lambda batch: batch, tokenizer, mode="sft")
    with pytest.raises(InputError, match=r"labels: expected the shape \(2, 6\) of input_ids, got \(2, 5\)"):
        collator(batch)


def test_rows_without_labels_are_counted_and_told_once(tokenizer, caplog):
    collator = DataCollatorForMEAP(padding(tokenizer), tokenizer, mode="sft")
    empty = {**pair(4, 60), "labels": [-100] * 65}
    for _ in range(2):
        assert collator([empty, pair(4, 60)])["input_ids"].shape[0] == 3
    assert collator.rows_without_labels == 2
    assert sum("have no labels" in record.message for record in caplog.records) == 1


# -- what is refused


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ({"input_ids": [1, MASK, 3]}, {}, f"mask token {MASK} is in the clean text, 1 times, first in row 0"),
        ({"inputs_embeds": [[0.5]]}, {}, "the batch has only inputs_embeds, expected input_ids"),
        ({"input_ids": [0.5, 1.5]}, {}, "expected integers"),
        (
            {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "shift_labels": [2, 3, -100]},
            {"mode": "sft"},
            "the batch has shift_labels",
        ),
        ({"input_ids": [1, 2, 3]}, {"mode": "sft"}, "labels: missing; mode sft tells answers by labels"),
    ],
)
def test_a_batch_that_cant_be_masked_is_named(features, options, message):
    collator = DataCollatorForMEAP(default_data_collator, mask_token_id=MASK, **options)
    with pytest.raises(InputError) as caught:
        collator([features])
    assert message in str(caught.value)


def test_fields_that_belong_to_no_row_are_refused_for_copies(tokenizer):
    collator = DataCollatorForMEAP(padding(tokenizer), tokenizer, mode="sft")
    batch = {**collator.clean([pair(4, 60)]), "pixel_values": torch.zeros(3, 8)}
    with pytest.raises(InputError, match="`pixel_values` has 3 entries for 1 rows"):
        collator.mask(batch)


def test_collators_that_mask_by_themselves_and_wrong_tokens_are_refused(tokenizer, bare):
    with pytest.raises(InputError, match="MEAP needs mlm=False"):
        DataCollatorForMEAP(DataCollatorForLanguageModeling(tokenizer), tokenizer)
    with pytest.raises(InputError, match="has no mask token; pass mask_token_id or add_mask_token=True"):
        DataCollatorForMEAP(default_data_collator, bare)
    with pytest.raises(InputError, match="needs a tokenizer or mask_token_id"):
        DataCollatorForMEAP(default_data_collator)
    with pytest.raises(InputError, match=r"is the tokenizer's pad_token"):
        DataCollatorForMEAP(default_data_collator, bare, mask_token_id=PAD)
    with pytest.raises(InputError, match=r"is the tokenizer's eos_token"):
        DataCollatorForMEAP(default_data_collator, bare, mask_token_id=EOS)
    with pytest.raises(InputError, match="mask_token_id 300 is beyond the model's embedding of 100 rows"):
        DataCollatorForMEAP(default_data_collator, mask_token_id=300, vocab_size=100)
    with pytest.raises(InputError, match="add_mask_token changes a model"):
        DataCollatorForMEAP(default_data_collator, tokenizer, add_mask_token=True)


def test_a_share_above_one_half_is_told(caplog):
    DataCollatorForMEAP(default_data_collator, mask_token_id=MASK, mask_ratio=0.6)
    assert "hides more than half" in caplog.text


# -- the token


def test_a_mask_token_that_is_there_is_taken_as_it_is(tokenizer):
    found = resolve_mask_token(tokenizer, tiny())
    assert (found.token, found.id, found.rows) == ("<mask>", MASK, None)
    assert resolve_mask_token(tokenizer, tiny(), "~").id == VOCABULARY["~"]
    with pytest.raises(InputError, match="has no token `<masq>`; did you mean `<mask>`"):
        resolve_mask_token(tokenizer, tiny(), "<masq>")
    with pytest.raises(InputError, match="mask_token_id 99 is beyond the model's embedding of 64 rows"):
        resolve_mask_token(tokenizer, tiny(64))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [100, 128])
def test_an_added_token_is_the_mean_and_leaves_no_trace_when_it_goes(bare, tied, rows):
    model = tiny(rows, tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vocabulary, size, suppressed = bare.get_vocab(), len(bare), model.generation_config.suppress_tokens
    state = torch.get_rng_state()
    mask = resolve_mask_token(bare, model, add_mask_token=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert (mask.token, mask.id, bare.mask_token_id) == ("[MASK]", size, size)
    embedding = model.get_input_embeddings().weight
    assert embedding.shape[0] == 128  # a multiple of 64, or what was there
    torch.testing.assert_close(embedding[size], before["model.embed_tokens.weight"][:size].mean(0))
    assert model.generation_config.suppress_tokens[-1] == size
    ids = torch.tensor([[1, size, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        embedding[size] += 1.0  # trained
    strip_mask_token(model, bare, mask)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in before.items()
    }
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.config.vocab_size == rows
    assert (bare.get_vocab(), bare.mask_token_id) == (vocabulary, None)
    assert model.generation_config.suppress_tokens == suppressed
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_only_the_last_token_can_go(bare):
    model = tiny()
    mask = resolve_mask_token(bare, model, add_mask_token=True)
    bare.add_tokens(["<later>"])
    with pytest.raises(InputError, match="only the last token can be taken away"):
        strip_mask_token(model, bare, mask)


def test_a_model_that_was_saved_with_its_token_is_stripped_by_the_record_alone(bare, tmp_path, caplog):
    model, plain = tiny(), copy.deepcopy(bare)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record = pickle.dumps(resolve_mask_token(bare, model, add_mask_token=True))
    model.save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    model, tokenizer = LlamaForCausalLM.from_pretrained(tmp_path), type(bare).from_pretrained(tmp_path)
    found = resolve_mask_token(tokenizer, model, add_mask_token=True)
    strip_mask_token(model, tokenizer, found)
    assert "`[MASK]` was there when it was resolved, so nothing is taken away" in caplog.text
    assert tokenizer.mask_token == "[MASK]"
    strip_mask_token(model, tokenizer, pickle.loads(record))
    assert (tokenizer.get_vocab(), tokenizer.mask_token) == (plain.get_vocab(), None)
    assert tokenizer("a line")["input_ids"] == plain("a line")["input_ids"]
    assert model.generation_config.suppress_tokens is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_is_never_generated_is_the_models_own(bare):
    model, other = tiny(), tiny()
    other.generation_config = shared = model.generation_config
    mask = resolve_mask_token(bare, model, add_mask_token=True)
    assert model.generation_config.suppress_tokens == [mask.id]
    assert shared.suppress_tokens is None
    shared = model.generation_config
    strip_mask_token(model, bare, mask)
    assert shared.suppress_tokens == [mask.id]


def test_a_token_to_add_needs_the_model(bare):
    with pytest.raises(InputError, match="a row of the model's embedding: pass the model too"):
        resolve_mask_token(bare, add_mask_token=True)


@pytest.mark.parametrize(
    ("changes", "wrapper"),
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "ModulesToSaveWrapper"),
        ({"modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper"),
        ({"trainable_token_indices": [3]}, "TrainableTokensWrapper"),
    ],
)
def test_an_embedding_that_peft_wraps_gets_its_token_before_and_loses_it_after(bare, changes, wrapper):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], **changes)
    vocabulary = bare.get_vocab()
    with pytest.raises(InputError, match=f"{wrapper} .* adds a token before get_peft_model"):
        resolve_mask_token(bare, peft.get_peft_model(tiny(), config), add_mask_token=True)
    assert bare.get_vocab() == vocabulary
    model = tiny()
    mask = resolve_mask_token(bare, model, add_mask_token=True)
    model = peft.get_peft_model(model, config)
    with pytest.raises(InputError, match=f"{wrapper} .* merge the adapter"):
        strip_mask_token(model, bare, mask)
    model = model.merge_and_unload()
    strip_mask_token(model, bare, mask)
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 100
    assert bare.get_vocab() == vocabulary


def test_a_frozen_embedding_is_told(bare, caplog):
    model = tiny().requires_grad_(False)
    resolve_mask_token(bare, model, add_mask_token=True)
    assert "the embedding is frozen" in caplog.text
