"""What pruning did, in the report: strips of masks, the learning beside fixed masks."""

from weightsmith.reports.pruning import _pruning


class Stage:
    name = "learned"


LAYERS = {
    "model.layers.0.mlp.up_proj.weight": {"shape": [8, 4], "kept_norm": 0.9, "changed": 0.25},
    "model.layers.1.mlp.up_proj.weight": {"shape": [8, 4], "kept_norm": 0.8, "changed": 0.5},
    "model.layers.1.self_attn.q_proj.weight": {"shape": [4, 4], "kept_norm": 0.7, "changed": 0.0},
    "extra.weight": {"shape": [4, 4], "kept_norm": 1.0, "changed": 0.0},
}
RECORD = {"method": "maskpro", "pattern": "2:4", "parameters": 200, "pruned": 96, "layers": LAYERS}


def test_matrices_stand_by_kind_and_layer_and_what_is_outside_of_layers_apart():
    made = _pruning(Stage(), {**RECORD, "losses": {}, "learning": None})
    (strip,) = made.strips
    assert (list(strip.rows), list(strip.columns), strip.num_summaries) == (
        ["mlp.up_proj", "self_attn.q_proj", "extra"],
        ["0", "1", "rest"],
        1,
    )
    assert strip.values == [[0.9, 0.8, None], [None, 0.7, None], [None, None, 1.0]]
    assert made.panel is None
    assert made.words == "maskpro keeps 2 of every 4 weights of 4 matrices, 48 % of the model."


def test_two_matrices_of_a_layer_that_end_alike_have_rows_of_their_own():
    layers = {
        "transformer.h.0.attn.c_proj.weight": {"shape": [4, 4], "kept_norm": 0.9},
        "transformer.h.0.mlp.c_proj.weight": {"shape": [8, 4], "kept_norm": 0.8},
    }
    made = _pruning(Stage(), {**RECORD, "layers": layers, "losses": {}, "learning": None})
    assert list(made.strips[0].rows) == ["attn.c_proj", "mlp.c_proj"]
    assert made.strips[0].values == [[0.9], [0.8]]


def test_learning_is_drawn_with_each_fixed_mask_as_a_line():
    losses = {"dense": 1.0, "magnitude": 2.0, "wanda": 1.5, "sparsegpt": 1.4, "first": 2.0, "maskpro": 1.7}
    tried = [2.1, 2.0, float("nan"), None, float("inf"), 1.9, 1.8]
    learning = {"steps": 7, "groups": 16, "changed": 0.25, "losses": tried}
    made = _pruning(Stage(), {**RECORD, "losses": losses, "learning": learning})
    assert [strip.title for strip in made.strips][1] == "Share of groups whose mask is not the first one"
    assert made.panel is not None
    chart = str(made.panel.chart)
    assert chart.count('class="level"') == len(losses)
    assert "2.000 → 1.700" in chart
    assert "nan" not in chart
    assert made.words.endswith("In 7 steps the masks of 25 % of 16 groups changed.")
    for worse, said in ((2.5, "2.5"), (None, "no finite number")):
        fallen = learning | {"kept": "first", "learnt_loss": worse}
        words = _pruning(Stage(), {**RECORD, "losses": losses, "learning": fallen}).words
        assert f"The learnt mask has a loss of {said} on" in words
        assert words.endswith("the first one’s, which is kept.")


def test_masks_without_a_finite_loss_are_no_lines_and_those_left_out_are_told():
    losses = {"dense": 1.0, "magnitude": None, "first": 2.0, "maskpro": None}
    learning = {"steps": 2, "groups": 16, "changed": 0.25, "losses": [2.1, 2.0]}
    absent = {"wanda": "q_proj: its layer got no inputs"}
    made = _pruning(Stage(), {**RECORD, "losses": losses, "absent": absent, "learning": learning})
    assert str(made.panel.chart).count('class="level"') == 2
    assert "2.000 → nan" in str(made.panel.chart)
    assert made.panel.note.endswith("Not compared with Wanda: q_proj: its layer got no inputs.")
    learning["losses"] = [None, float("inf")]
    assert _pruning(Stage(), {**RECORD, "losses": losses, "learning": learning}).panel is None
