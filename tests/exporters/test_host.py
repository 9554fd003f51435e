import pytest

from exporters import cpu_name, host, isa, vector_block


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    def write(flags, machine="x86_64"):
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\nmodel name\t: B\n")
        monkeypatch.setattr(host, "CPUINFO", path)
        monkeypatch.setattr(host.platform, "machine", lambda: machine)
        host._cpuinfo.cache_clear()

    yield write
    monkeypatch.undo()
    host._cpuinfo.cache_clear()


@pytest.mark.parametrize(
    ("flags", "machine", "name", "block", "vnni"),
    [
        ("sse2 avx avx2", "x86_64", "avx2", 8, False),
        ("sse2 avx avx2 avx_vnni", "x86_64", "avx2", 8, True),
        ("sse2 avx avx2 avx512f avx512_vnni", "x86_64", "avx512", 16, True),
        ("sse2 avx", "AMD64", "avx", 8, False),
        ("sse2", "x86_64", "sse", 8, False),
        ("", "aarch64", "neon", 4, True),
        ("", "arm64", "neon", 4, True),
        ("", "riscv64", "riscv64", 4, False),
    ],
)
def test_flags_tell_the_instruction_set(cpuinfo, flags, machine, name, block, vnni):
    cpuinfo(flags, machine)
    assert (isa(), vector_block(), host.has_vnni()) == (name, block, vnni)


def test_the_name_is_the_first_processor(cpuinfo):
    cpuinfo("avx2")
    assert cpu_name() == "A CPU"


def test_a_system_without_cpuinfo_still_has_a_name(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "missing")
    host._cpuinfo.cache_clear()
    assert cpu_name()
    assert vector_block() in {4, 8, 16}
    host._cpuinfo.cache_clear()
