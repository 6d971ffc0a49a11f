"""The page of a study in a real browser: the headline first, every figure drawn, no arm missing."""

from report_runs import browse, document, in_browser, sample

from wmtp.reporting.study import write_study_report
from wmtp.studies.config import load_study
from wmtp.studies.plan import make_plan
from wmtp.studies.record import RunRecord
from wmtp.studies.table import make_table

BASE = {
    "models": {"base": {"type": "scratch", "vocab_size": 258, "hidden_size": 32, "layers": 2, "attention_heads": 2}},
    "tokenizer": {"type": "bytes"},
    "datasets": {"code": {"type": "python-source"}},
    "data": {"eval": {"holdout": 0.1}},
    "trainer": {"type": "baseline-mtp"},
    "train": {"max_steps": 4},
}
HOSTILE = "</script><b>x"


def make_study(folder, *, seeds=(0, 1, 2), texts=True):
    """A study of two arms that has ended: its plan and the records of its runs."""
    mapping = {
        "study": {"name": "Weights", "seeds": list(seeds), "baseline": "baseline", "metrics": ["eval/loss/head_1"]},
        "arms": {
            "baseline": {},
            "focal": {"set": {"trainer": {"type": "focal"}}},
            "dft": {"set": {"trainer": {"type": "dft"}}},
        },
        "comparisons": [{"arm": "focal"}],
    }
    plan = make_plan(load_study(mapping), [BASE])
    records = {}
    for run in plan.runs:
        value = (
            {"baseline": 3.0, "focal": 2.5, "dft": 3.0}[run.arm]
            + 0.01 * run.seed
            + (0.02 * (run.seed % 2) if run.arm == "dft" else 0)
        )
        weights = [[None, 1.0, 4.0, 0.25, 0.0], [None, None, 1.0, 1.0, 0.0]]
        model = {"models.ref.uri": f"studies/x/runs/ref-seed{run.seed}-0123abcd/model"} if run.arm == "dft" else {}
        shown = document(["def", " f", HOSTILE, ":\n", "  pass"], weights=weights if run.arm == "focal" else None)
        records[run.name] = RunRecord(
            name=run.name, arm=run.arm, seed=run.seed, key=run.key, status="finished", steps=4, tokens=100.0, seconds=60.0,
            metrics={"eval/loss/head_1": value}, data={"train": "t", "eval": f"e{run.seed}"}, device="cpu",
            page={
                "curves": {"eval/loss/head_1": ([2, 4], [value + 1, value]), "loss": ([1, 2], [value + 2, value])},
                "samples": [sample(4, shown)] if texts else [],
                "config": {"trainer.type": run.config.trainer.type, "optimizer.lr": "1", "run.seed": str(run.seed), **model},
            },
        )  # fmt: skip
    return plan, records


def write(folder, **options):
    plan, records = make_study(folder, **options)
    page = folder / "report.html"
    write_study_report("Weights", "baseline", make_table(plan, records), list(records.values()), page)
    return page


@in_browser
def test_the_page_opens_with_the_difference_and_draws_everything(tmp_path):
    found = browse(
        write(tmp_path),
        """
        const all = (selector, of = e => e.textContent) => [...document.querySelectorAll(selector)].map(of);
        return { lead: all('.lead')[0], delta: all('.delta b')[0], interval: all('.delta span')[0], headings: all('h2'),
          figures: all('figure svg', e => e.getAttribute('aria-label')), bands: all('#curves polygon').length,
          dots: all('#differences circle', e => e.querySelector('title').textContent), panels: all('.panel header b'),
          rows: all('#table tbody tr').length, differ: all('#settings tbody th'),
          values: all('#settings tbody tr:last-child td'),
          empty: all('th').filter(text => !text.trim()).length, injected: all('.text b').length,
          wide: document.documentElement.scrollWidth };
        """,
        width=500,
    )
    assert found["lead"] == "focal − baseline in eval/loss/head_1: lower, better."  # the numbers stand below it, once
    assert found["delta"] == "−0.5"
    assert found["interval"] == "95 % interval −0.5 to −0.5, 3 seeds"
    assert [heading.partition(",")[0].partition(":")[0] for heading in found["headings"]] == [
        "The same text", "Curves", "Differences", "Table", "What differs between the arms"
    ]  # fmt: skip
    assert found["figures"][-1] == "differences in eval/loss/head_1"
    assert found["bands"] == 6  # three arms in two figures
    assert [dot.partition(":")[0] for dot in found["dots"]] == ["focal − baseline", "dft − baseline"]
    assert "no difference seen" in found["dots"][1]
    assert found["panels"] == ["focal", "baseline"]
    assert found["rows"] == 3
    assert found["differ"] == ["trainer.type", "models.ref.uri"]  # neither the seed nor what all have
    assert found["values"] == ["–", "–", "${arm:ref}"]
    assert found["empty"] == 0  # a screen reader has something to say of each column
    assert found["injected"] == 0
    assert found["wide"] <= 500


@in_browser
def test_one_seed_and_no_texts_still_make_a_page(tmp_path):
    found = browse(
        write(tmp_path, seeds=(5,), texts=False),
        "return [document.querySelector('.delta span').textContent, document.querySelectorAll('polygon').length]",
    )
    assert found == ["one seed: no interval", 0]


@in_browser
def test_an_arm_can_be_hidden_from_the_curves_and_never_all(tmp_path):
    found = browse(
        write(tmp_path),
        """
        const lines = () => document.querySelector('#curves svg').querySelectorAll('polyline').length, seen = [lines()];
        for (const i of [0, 1, 2, 0]) { document.querySelectorAll('.key button')[i].click(); seen.push(lines()); }
        const pressed = [...document.querySelectorAll('.key button')].map(e => e.ariaPressed);
        return [seen, pressed, document.activeElement.textContent];
        """,
    )
    assert found == [[3, 2, 1, 1, 2], ["true", "false", "true"], "baseline"]


@in_browser
def test_one_arm_far_away_leaves_the_others_to_be_seen(tmp_path):
    found = browse(
        write(tmp_path),
        """
        const row = (label, value, low, high) => ({ label, value, low, high, note: '', color: 'red', filled: true });
        const rows = [row('a', -0.6, -0.61, -0.59), row('b', 0.07, 0.05, 0.09), row('c', 3.1, 1.9, 4.4),
          row('d', -0.1, null, null)];
        const svg = Svg.forest(rows, 'x')(800);
        return { words: [...svg.querySelectorAll('text')].map(e => e.textContent),
          outside: svg.querySelectorAll('.outside').length,
          places: [...svg.querySelectorAll('circle')].map(e => Number(e.getAttribute('cx'))) };
        """,
    )
    assert (found["outside"], len(found["places"])) == (1, 3)
    assert "3.1, outside" in found["words"]
    assert "0" in found["words"]  # and not -1.39e-16
    assert max(found["places"]) - min(found["places"]) > 200
