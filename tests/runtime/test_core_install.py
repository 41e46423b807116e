"""What `cmake --install` gives, and that a program outside the tree builds with it and runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cpp.core_abi import ROOT, installed_prefix, onnxruntime_library, run

from mla_deploy.runtime import GenerationOptions, load

PROMPT = [10, 20, 30]
HEADERS = ROOT / "runtime" / "include" / "mla_deploy"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A moved copy: nothing in it may say where it was installed first."""
    found = installed_prefix()
    if isinstance(found, str):
        pytest.skip(f"libmla_deploy.so cannot be built: {found}")
    return shutil.copytree(found, tmp_path_factory.mktemp("prefix") / "moved", symlinks=True)


def test_the_component_holds_what_a_program_needs_and_no_more(prefix: Path) -> None:
    files = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    library = next(name for name in files if name.endswith("/libmla_deploy.so"))
    folder = library.rpartition("/")[0]
    libraries = {name for name in files if name.startswith(f"{folder}/libmla_deploy.so")}
    assert len(libraries) == 3  # the file, its soname, the name to link
    assert files - libraries - {f"{folder}/libmla_deploy_ops.so"} == {
        *(f"include/mla_deploy/{header.name}" for header in HEADERS.iterdir()),
        f"{folder}/cmake/mla_deploy/mla_deploy-config.cmake",
        f"{folder}/cmake/mla_deploy/mla_deploy-config-version.cmake",
        f"{folder}/cmake/mla_deploy/mla_deploy-targets.cmake",
        f"{folder}/cmake/mla_deploy/mla_deploy-targets-release.cmake",
        f"{folder}/pkgconfig/mla_deploy.pc",
    }


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_the_library_exports_the_abi_and_needs_no_onnxruntime(prefix: Path) -> None:
    library = next(prefix.rglob("libmla_deploy.so"))
    headers = [prefix / "include" / "mla_deploy" / name for name in ("runtime.h", "text.h")]
    symbols = run(["nm", "-D", "--defined-only", str(library)]).splitlines()
    declared = {
        line.split("(")[0].split()[-1].lstrip("*")
        for header in headers
        for line in header.read_text().splitlines()
        if line.startswith("MLA_API")
    }
    assert {line.split()[-1] for line in symbols} == declared
    needed = run(["readelf", "-d", str(library)])
    for other in ("libonnxruntime", "libpcre2", "libutf8proc"):  # the last two are linked in
        assert other not in needed


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["cc", "-std=c99"], "runtime.h"),
        (["cc", "-std=c99"], "text.h"),
        (["c++", "-std=c++17"], "text.h"),
        (["c++", "-std=c++17"], "runtime.hpp"),
        (["c++", "-std=c++20"], "runtime.hpp"),
    ],
)
def test_the_headers_compile_without_a_warning(
    prefix: Path, tmp_path: Path, command: list[str], file: str
) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    source = tmp_path / ("source.c" if command[0] == "cc" else "source.cpp")
    structs = re.findall(r"#define (MLA_(\w+)_INIT)", (HEADERS / "runtime.h").read_text())
    assert len(structs) == 7
    lines = [f"mla_{name.lower()} {name.lower()} = {macro};" for macro, name in structs]
    source.write_text("\n".join([f"#include <mla_deploy/{file}>", *lines, ""]))
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{prefix}/include"]
    run([*command, *flags, "-c", str(source), "-o", str(tmp_path / "object")])


def test_a_program_built_with_another_abi_version_is_told_so(prefix: Path, tmp_path: Path) -> None:
    shutil.copytree(prefix / "include", tmp_path / "include")
    header = tmp_path / "include" / "mla_deploy" / "runtime.h"
    text = header.read_text()
    assert "#define MLA_ABI_VERSION 1\n" in text
    header.write_text(text.replace("#define MLA_ABI_VERSION 1\n", "#define MLA_ABI_VERSION 2\n"))
    source = tmp_path / "program.cpp"
    source.write_text(
        "#include <cstdio>\n#include <mla_deploy/runtime.hpp>\n"
        "int main() {\n"
        "    mla_engine_options options = MLA_ENGINE_OPTIONS_INIT;\n"
        "    try { mla::Engine engine(options); }\n"
        "    catch (const mla::Error& error) { std::puts(error.what()); }\n"
        "}\n"
    )
    library = next(prefix.rglob("libmla_deploy.so"))
    flags = ["-std=c++17", f"-I{tmp_path}/include", f"-Wl,-rpath,{library.parent}"]
    run(["c++", *flags, str(source), str(library), "-o", str(tmp_path / "program")])
    assert "another ABI version" in run([str(tmp_path / "program")])


def build_with_cmake(prefix: Path, work: Path, program: str = "minimal") -> Path:
    source = shutil.copytree(ROOT / "examples" / "cpp", work / "source")
    run(["cmake", "-S", str(source), "-B", str(work / "b"), f"-DCMAKE_PREFIX_PATH={prefix}"])
    run(["cmake", "--build", str(work / "b"), "--target", program])
    return work / "b" / program


def build_with_pkg_config(prefix: Path, work: Path) -> Path:
    folder = next(prefix.rglob("mla_deploy.pc")).parent
    found = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "mla_deploy"],
        env=os.environ | {"PKG_CONFIG_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    source = ROOT / "examples" / "cpp" / "minimal.cpp"
    flags = [*found.stdout.split(), f"-Wl,-rpath,{folder.parent}"]
    run(["c++", "-std=c++17", str(source), "-o", str(work / "minimal"), *flags])
    return work / "minimal"


@pytest.mark.slow
@pytest.mark.parametrize("build", [build_with_cmake, build_with_pkg_config])
def test_the_minimal_program_builds_outside_the_tree_and_runs(
    prefix: Path, toy: Any, tmp_path: Path, build: Any
) -> None:
    if build is build_with_pkg_config and shutil.which("pkg-config") is None:
        pytest.skip("there is no pkg-config")
    program = build(prefix, tmp_path)
    command = [str(program), str(toy.path), str(onnxruntime_library()), "12"]
    result = subprocess.run([*command, *map(str, PROMPT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [int(line) for line in result.stdout.split()] == toy.greedy(PROMPT, 12)
    assert "12 tokens" in result.stderr
    wrong = subprocess.run([*command, "-7"], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "not in the model's vocabulary" in wrong.stderr


def test_the_minimal_program_is_minimal() -> None:
    text = (ROOT / "examples" / "cpp" / "minimal.cpp").read_text()
    assert len(text.splitlines()) <= 60


# ---- the chat program --------------------------------------------------------------------------

TURN = "Question: {} Answer:"


@pytest.fixture(scope="module")
def chat(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_with_cmake(prefix, tmp_path_factory.mktemp("chat"), "chat")


def start(chat: Path, bundle: Path) -> subprocess.Popen[str]:
    command = [chat, bundle, onnxruntime_library(), TURN]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


@pytest.mark.slow
def test_the_chat_program_goes_on_from_turn_to_turn(chat: Path, tiny_bundle: Path) -> None:
    lines = ["Who kept the light?", "Naïve 中文"]
    output, messages = start(chat, tiny_bundle).communicate("\n".join(lines) + "\n", timeout=300)
    engine = load(tiny_bundle, kernels="stock")
    session = engine.session()  # reused as the program does: another split rounds otherwise
    conversation: list[int] = []
    expected = ""
    for line in lines:
        text = TURN.replace("{}", line)
        conversation += engine.tokenizer.encode(text, add_special_tokens=False)
        made = engine.generate(conversation, GenerationOptions(max_tokens=256), session=session)
        conversation += made.tokens
        expected += engine.tokenizer.decode(made.tokens) + "\n"
    assert output == expected, messages
    # All of the first turn but its last token is in the cache when the second comes.
    reused = re.findall(r"tokens of the prompt, (\d+) of them cached", messages)
    assert int(reused[0]) == 0
    assert int(reused[1]) > 200


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_then_the_program(chat: Path, tiny_bundle: Path) -> None:
    with start(chat, tiny_bundle) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdin.write("Who kept the light?\n")
        program.stdin.flush()
        assert program.stdout.read(1)  # it answers
        program.send_signal(signal.SIGINT)
        assert "(stopped)" in program.stderr.readline() + program.stderr.readline()
        program.send_signal(signal.SIGINT)
        assert program.wait(timeout=60) == 130
