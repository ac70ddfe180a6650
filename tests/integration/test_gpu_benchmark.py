"""benchmarks.gpu: every row runs somewhere, no row takes the others with it, and the documents show the results."""
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from stand_in_rows import row

import benchmarks.gpu.runner as runner
from benchmarks.gpu import profile, tables
from benchmarks.gpu.row import Row, Scale
from benchmarks.gpu.rows import ESSENTIAL, PARTS, all_rows
from common.errors import Stopped, UserError
from helpers import ROOT

TINY = Scale("cpu", is_tiny=True)
# A row of each part that takes a second or less, and what it calls.
ROWS = {
    "correctness": ("one process with NCCL", "correctness.randomize"),
    "training": ("XL/2 --fast, batch 128", "training.OurStep"),
    "profile": ("a training step of S/2 --fast, batch 256", "profile.build_step"),
    "sampling": ("XL/2 --fast, 250 steps, batch 32", "sampling.build_pipeline"),
    "options": ("EMA of XL/2, the device decides", "training.time_alone"),
    "memory": ("XL/2 bf16, batch 64", "training.predict_memory"),
    "loading": ("latent cache, 8 workers", "loading.write_random_cache"),
}


def find_row(name):
    return next(each for each in all_rows() if each.name == name)


def test_rows_have_distinct_names_and_functions_that_exist():
    rows = all_rows()
    assert len({each.name for each in rows}) == len(rows) and {each.part for each in rows} == set(PARTS)
    assert [each.name for each in rows[:len(ESSENTIAL)]] == list(ESSENTIAL)
    assert sum(each.seconds for each in rows[:len(ESSENTIAL)]) <= 9 * 60
    for each in rows:
        module, name = each.function.split(":")
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("part", [part for part in PARTS if part != "loading"])  # its workers take seconds to start
def test_a_row_of_each_part_runs_at_a_tiny_size(part):
    result = runner.execute(find_row(ROWS[part][0]), TINY)
    assert result["status"] == "ok", result
    assert any(isinstance(value, float) and value >= 0 for value in result.values())


@pytest.mark.parametrize("name, checked", [("golden vectors in float32", dict(results=1125, broken=0)),
                                           ("a sampling step never waits", dict(steps=4)),
                                           ("--fast against plain, 200 steps", dict(steps=3))])
def test_checks_hold_on_the_cpu(name, checked):
    result = runner.execute(find_row(name), TINY)
    assert result["status"] == "ok" and checked.items() <= result.items(), result


def test_a_wrong_result_is_a_failed_check(monkeypatch):
    from benchmarks.gpu import correctness
    monkeypatch.setattr(correctness, "create_diffusion", lambda *args, create=correctness.create_diffusion, **options:
                        create(*args, **options | dict(noise_schedule="squaredcos_cap_v2")))
    result = runner.execute(find_row("golden vectors in float32"), TINY)
    assert result["status"] == "failed" and result["largest_difference"] > 1e-3 and result["over_tolerance"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("error, status", [
    (torch.OutOfMemoryError("CUDA out of memory\nmore"), "out of memory"),
    (RuntimeError("no kernel image is available"), "error"), (ImportError("No module named 'triton'"), "error")])
def test_a_fault_in_any_part_is_a_row(part, error, status, monkeypatch):
    name, called = ROWS[part]

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(f"benchmarks.gpu.{called}", fail)
    result = runner.execute(find_row(name), TINY)
    assert result["status"] == status and str(error).splitlines()[0] in result["reason"]


def test_whatever_a_row_does_the_others_have_results(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MIN_LIMIT", 3)
    kinds = ("out of memory", "error", "failed", "skipped", "crashed", "timed out")
    rows = [row("first", "measure", value=1)]
    for kind in kinds:
        rows += [row(kind, "fail", kind=kind), row(f"after {kind}", "measure", value=2)]
    lines, too_long = [], row("too long", "measure", seconds=3600, value=3)
    assert runner.run_rows([too_long, *rows], TINY, tmp_path, minutes=50, log=lines.append) == [too_long]
    stored = runner.ResultStore(tmp_path).rows
    assert list(stored) == [each.name for each in rows]
    assert {name: result["status"] for name, result in stored.items()} == {
        each.name: each.name if each.name in kinds else "ok" for each in rows}
    assert all(result["made"]["versions"]["torch"] for result in stored.values())
    assert stored["failed"]["difference"] == 0.5 and "SIGABRT" in stored["crashed"]["reason"]
    assert "\n" not in stored["error"]["reason"] and len(lines) == 1 + len(rows)
    # The second start has nothing to do, unless failures are to be tried again.
    assert runner.ResultStore(tmp_path).missing(rows) == []
    failed = {each.name for each in runner.ResultStore(tmp_path).missing(rows, retry_failed=True)}
    assert failed == set(kinds) - {"skipped"}


RUN = """
import sys
from benchmarks.gpu.row import Scale
from benchmarks.gpu.runner import run_rows
from stand_in_rows import row
if __name__ == "__main__":
    rows = [row(str(i), "measure_slowly", folder=sys.argv[1], number=i) for i in range(4)]
    run_rows(rows, Scale("cpu", True), sys.argv[1], 10)
"""


def test_killed_twice_it_continues_with_what_is_missing(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = os.environ | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    for kill_at in ("began-1", "began-2", None):
        process = subprocess.Popen([sys.executable, script, tmp_path], env=environment, cwd=tmp_path)
        while kill_at and not (tmp_path / kill_at).exists():
            assert process.poll() is None
            time.sleep(0.02)
        if kill_at:
            process.send_signal(signal.SIGKILL)
        assert (process.wait() == 0) == (kill_at is None)
    rows = json.loads((tmp_path / runner.RESULTS).read_text())["rows"]
    assert sorted(result["number"] for result in rows.values()) == [0, 1, 2, 3]


def test_a_signal_stops_between_results(tmp_path):
    asked = iter([False, True])
    with pytest.raises(Stopped):
        runner.run_rows([row("hangs", "fail", kind="timed out")], TINY, tmp_path, 5, lambda: next(asked), log=str)
    assert not (tmp_path / runner.RESULTS).exists()


def test_command_runs_a_part_and_refuses_a_gpu_that_is_not_there(command, tmp_path):
    status, out, _ = command("benchmarks.gpu.__main__", "--device", "cpu", "--parts", "profile", "--output", tmp_path)
    assert status == 0 and out.count("[profile]") == 3
    if not torch.cuda.is_available():
        status, _, err = command("benchmarks.gpu.__main__", "--output", tmp_path)
        assert status != 0 and "--device" in err and "Traceback" not in err


# ---------------------------------------------------------------- documents

def result(part, status="ok", **values):
    made = dict(device="NVIDIA H200", versions=dict(torch="2.11.0"), cuda="12.8", driver="570", commit="abc",
                date="2026-12-01T00:00")
    return dict(part=part, status=status, made=made, duration=1.0) | values


def test_documents_hold_what_was_measured():
    rows = tables.read_rows(ROOT / tables.DEFAULT_RESULTS)
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert tables.MARKS.search(text) and tables.fill_page(text, rows) == text


def test_tables_show_results_failures_and_ratios():
    speed = dict(lowest=0.4, highest=0.6, images_per_second=256.0, memory_gb=90.0, warm_up_seconds=60.0)
    rows = {"XL/2 published recipe, TF32, batch 128": result("training", seconds=1.2, **speed),
            "XL/2 --fast, batch 128": result("training", seconds=0.5, mfu=0.456, **speed),
            "XL/2 --fast, batch 256": result("training", "out of memory", reason="CUDA out of memory"),
            "a resumed run": result("correctness", "failed", reason="it differs", resumed_differs=0.1)}
    text = tables.format_part("training", rows)
    assert "| XL/2 --fast, batch 128 | 256 | 45.6% | 0.500 (0.400 to 0.600) | 90.0 | 2.40 | 60 |" in text
    assert "out of memory: CUDA out of memory" in text and "NVIDIA H200, torch 2.11.0" in text
    assert "**failed**: it differs" in tables.format_part("correctness", rows)
    assert tables.NOT_MEASURED in tables.format_part("sampling", rows)
    summary = tables.format_summary(rows)
    assert "256 images/s, MFU 46%, 2.40 times the published code" in summary and tables.NOT_MEASURED in summary


def test_a_profile_is_a_table_of_classes():
    row = result("profile", total_ms=100.0, milliseconds=dict(attention=10.0, idle=1.5), kernels=[["flash_fwd", 9.0]])
    text = tables.format_part("profile", {"a training step of XL/2 --fast, batch 128": row})
    assert "| in all | 100.00 |" in text and "| idle | 1.50 |" in text and "`flash_fwd` 9.00" in text


def test_results_of_a_cpu_are_no_measurements(tmp_path):
    runner.ResultStore(tmp_path).add(row("any", "measure"), dict(status="ok", made=dict(device="cpu, x86_64")))
    with pytest.raises(UserError):
        tables.read_rows(tmp_path)


@pytest.mark.parametrize("name, kind", [
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16>", "matrix products"),
    ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
    ("triton_red_fused_native_layer_norm_3", "pointwise, norms, sums"),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer and EMA"),
    ("Memcpy DtoD (Device -> Device)", "copies"), ("ncclDevKernel_AllReduce", "communication")])
def test_kernels_are_classified_by_name(name, kind):
    assert profile.classify(name) == kind


def test_time_that_kernels_overlap_counts_once():
    assert profile.busy_us([(0, 10), (5, 12), (20, 21)]) == 13


def test_rows_are_plain_data():
    assert all(isinstance(each, Row) and json.loads(json.dumps(each.settings)) is not None for each in all_rows())
