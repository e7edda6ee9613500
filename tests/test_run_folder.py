"""The run folder: what it says of a run that ended well, was stopped, or failed; and how its result is checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import glmkit
from glmkit.errors import DataError, OutputError, RunRefusedError, UsageError
from glmkit.train import reopened
from glmkit.train import watch as watching
from glmkit.train.arguments import Recipe
from glmkit.train.blocks import ModelBlock
from glmkit.train.checkpoints import lock_folder
from glmkit.train.curves import curves_of, draw_svg, sparkline
from glmkit.train.report import write_report
from glmkit.train.run import finetune
from tiny import train_tokenizer, write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return write_model(folder / "tiny-chat", train_tokenizer(folder / "tokenizer.model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "records.jsonl"
    rows = [{"content": f"上衣 {word}", "summary": f"{word} hello world"} for word in ("棉", "显瘦", "tea", "rice")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    return file


def made(folder: Path, base: Path, data: Path, method: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    block = {"learning_rate": 1e-3, "max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 4, **settings}
    content = {"model": {"path": str(base)}, "data": {"train_file": str(data), "eval_file": str(data)}}
    return Recipe.model_validate(
        {**content, "method": method or {"name": "lora"}, "train": block, "output": {"dir": str(folder)}}
    )


def text_of(page: str) -> str:
    return re.sub(r"<[^>]+>", " ", page)


def test_a_finished_run_says_what_ran_on_what_and_what_came_of_it(tmp_path: Path, base: Path, data: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "run"
    result = finetune(made(folder, base, data, probe_prompts=["上衣 棉", "<script>|x|</script>"]), progress=False)
    files = {"config.yaml", "config.resolved.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "log.txt"}
    files |= {"exit.json", "report.md", "report.html", "plots", "adapter", "run.json"}
    assert files <= {path.name for path in folder.iterdir()}
    ended = json.loads((folder / "exit.json").read_text())
    assert (ended["ended"], ended["step"], ended["total_steps"], ended["cause"]) == ("finished", 4, 4, None)
    assert ended["result"] == "adapter"
    environment = json.loads((folder / "env.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    report, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for said in (report, text_of(page)):
        assert "how it ended" in said
        assert f"{result.loss:.4f}" in said
        assert f"{result.eval_loss:.4f}" in said
        assert "12 records" in said
        assert f"glm finetune {folder / 'config.resolved.yaml'}" in said
        assert "What the model says" in said
    # The page needs nothing beside it and runs nothing, whatever a model answers.
    assert page.count("<svg") == len(curves_of(result.metrics)) >= 4
    assert not re.search(r"<script|<img|src=|href=|https?://", page)
    assert "&lt;script&gt;|x|&lt;/script&gt;" in page
    for name in ("loss", "learning_rate", "throughput", "memory"):
        assert (folder / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    again = yaml.safe_load((folder / "config.resolved.yaml").read_text())
    assert Recipe.model_validate(again) == made(folder, base, data, probe_prompts=["上衣 棉", "<script>|x|</script>"])


def test_a_card_lies_beside_the_adapter(tmp_path: Path, base: Path, data: Path) -> None:
    result = finetune(made(tmp_path / "run", base, data), progress=False)
    _, head, text = (tmp_path / "run" / "adapter" / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert (card["base_model"], card["base_model_relation"], card["library_name"]) == ("tiny-chat", "adapter", "peft")
    (metric,) = card["model-index"][0]["results"][0]["metrics"]
    assert metric == {"type": "eval_loss", "name": "eval_loss", "value": pytest.approx(result.eval_loss, abs=1e-6)}
    assert 'glmkit.load("tiny-chat", adapter="this folder")' in text.replace("glm = ", "")
    assert "lora: rank 8" in text
    assert str(tmp_path) not in head + text  # paths of this machine say nothing to others


def test_a_record_that_cannot_be_used_ends_with_a_report_that_names_its_line(
    tmp_path: Path, base: Path, data: Path
) -> None:
    data.write_text(data.read_text() + '{"content": "上衣"}\n')
    with pytest.raises(DataError) as caught:
        finetune(made(tmp_path / "run", base, data), progress=False)
    assert "records.jsonl:13" in str(caught.value)
    ended = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (ended["ended"], ended["error"], ended["step"]) == ("failed", "DataError", 0)
    assert "records.jsonl:13" in ended["cause"]
    for file in ("report.md", "report.html"):
        assert "records.jsonl:13" in (tmp_path / "run" / file).read_text()
    # Mended, it begins in the same folder; nothing of the failure is left.
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    finetune(made(tmp_path / "run", base, data), progress=False)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["ended"] == "finished"
    assert "Why it ended" not in (tmp_path / "run" / "report.md").read_text()


def test_a_run_that_is_refused_leaves_the_other_ones_folder_alone(tmp_path: Path, base: Path, data: Path) -> None:
    folder = tmp_path / "run"
    finetune(made(folder, base, data), progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    with pytest.raises(RunRefusedError, match="already holds a run"):
        finetune(made(folder, base, data), progress=False)
    # Also a failure before the folder is looked at, and one of --resume while another run holds the lock.
    with pytest.raises(DataError):
        finetune(made(folder, base, tmp_path / "nothing.json"), progress=False)
    with lock_folder(folder), pytest.raises(DataError):
        finetune(made(folder, base, tmp_path / "nothing.json"), resume=True, progress=False)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert {name: time for name, time in after.items() if before.get(name) != time and name != ".lock"} == {}


def test_a_killed_run_has_a_report_too(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 3 / step, "tokens_per_second": 10.0} for step in range(1, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "lo')
    report = write_report(tmp_path).read_text()
    assert "it runs, or it was killed" in report
    assert "| optimizer steps | 29 |" in report


def test_curves_by_hand() -> None:
    assert sparkline([(0, 0.0), (1, 7.0), (2, 3.5)]) == "▁█▅"
    assert sparkline([(step, float(step // 50)) for step in range(100)], width=4) == "▁▁██"
    assert sparkline([]) == ""
    (curve,) = curves_of([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": float("nan")}])
    drawn = draw_svg(curve)
    # From the left border at the top to the right border above the axis.
    assert 'points="70.0,12.0 630.0,208.0"' in drawn
    assert ">step 1<" in drawn
    assert ">step 2<" in drawn


METHODS = [
    {"name": "full"},
    {"name": "freeze", "num_layer_trainable": 1},
    {"name": "lora"},
    {"name": "ptuning_v2", "pre_seq_len": 4},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_every_methods_result_is_what_was_trained(
    tmp_path: Path, base: Path, data: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison itself, with the new process played in this one."""
    compared: list[Path] = []

    def keep(model: Any, block: ModelBlock, result: Path) -> str:
        monkeypatch.undo()
        played: list[float] = []

        def here(function: str, arguments: dict[str, Any], **_: Any) -> float:
            assert function == "glmkit.train.reopened:difference"
            played.append(reopened.difference(**json.loads(json.dumps(arguments))))
            return played[-1]

        with monkeypatch.context() as patch:
            patch.setattr(reopened, "in_new_process", here)
            said = reopened.compare_result(model, block, result)
        assert played[0] < 1e-5
        compared.append(result)
        return said

    monkeypatch.setattr(reopened, "compare_result", keep)
    finetune(made(tmp_path / "run", base, data, method, learning_rate=3e-2), progress=False)
    assert len(compared) == 1
    assert "the same logits in a new process" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.new_process
def test_t43_the_result_is_opened_again_before_the_run_is_done(tmp_path: Path, base: Path, data: Path) -> None:
    result = finetune(made(tmp_path / "run", base, data, learning_rate=3e-2), progress=False)
    assert "the same logits in a new process" in (tmp_path / "run" / "report.md").read_text()
    assert result.result_dir is not None
    # What is another model, or none, is found out.
    block = ModelBlock(path=str(base))
    with pytest.raises(OutputError, match="is not what was trained: its logits differ by"):
        reopened.compare_result(glmkit.load(base).model, block, result.result_dir)
    (result.result_dir / "adapter_config.json").write_text("{")
    with pytest.raises(OutputError, match="could not be opened again") as found:
        reopened.compare_result(glmkit.load(base).model, block, result.result_dir)
    assert found.value.hint == "the checkpoints are whole; --resume writes the result again"


def test_a_run_is_watched_from_its_first_step(
    tmp_path: Path, base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, seen = made(tmp_path / "run", base, data), []

    def look(step: int, total: int, figures: dict[str, float]) -> None:
        seen.append(watching.describe(tmp_path / "run", runs=watching._is_held(tmp_path / "run")))

    finetune(recipe, progress=False, on_step=look)
    assert seen[2][0].startswith(f"{tmp_path / 'run'}: step 3 of 4, about 0 min ")
    assert re.match(r"  training +[▁▂▃▄▅▆▇█]{3} [\d.]+ nats per label token", seen[2][1])
    assert "does not run" not in "".join(seen[2])
    capsys.readouterr()
    watching.watch(tmp_path / "run")  # comes back, because the run has ended
    shown = capsys.readouterr().out
    assert "step 4 of 4\n" in shown
    assert "it does not run: finished" in shown
    with pytest.raises(UsageError, match="holds no run"):
        watching.watch(tmp_path)
