"""What runs inside the sandbox: starts ipykernel with as little as it needs. Never imported by the server.

The server reads this file and starts it as `python -I -c <source>`, so the sandbox need not see this package. Nothing
here is a boundary: code of the model runs in the same process and can change all of it. It only makes honest code
behave: quick start, pictures, Chinese text in plots, output that the reader can keep up with.

Its only argument is a private folder for sockets and settings. There it finds kernel.json: `data` is the working
directory, `key` signs the messages.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

_PENDING_CHARACTERS = 1 << 18
"""Printed text that may wait before the printing thread has to."""

_VALUE_CHARACTERS = 1 << 16
"""What is shown of a value."""

_CHINESE_FONTS = (
    "Noto Sans CJK SC, Noto Sans CJK JP, Noto Sans SC, Source Han Sans SC, Source Han Sans CN, WenQuanYi Micro Hei, "
    "WenQuanYi Zen Hei, Microsoft YaHei, PingFang SC, SimHei, Noto Serif CJK SC, Noto Serif CJK JP, Droid Sans Fallback"
)


def _hide(*modules: str) -> None:
    """Makes optional modules look as if they were not installed; they cost time and memory and serve editors."""
    for name in modules:
        sys.modules[name] = None  # type: ignore[assignment]


def _settings_of_plots(folder: Path) -> None:
    """Writes matplotlib's settings: inline pictures, a Chinese font if there is one, a minus sign that fonts have."""
    settings = folder / "matplotlib"
    settings.mkdir(exist_ok=True)
    (settings / "matplotlibrc").write_text(
        f"font.family: DejaVu Sans, {_CHINESE_FONTS}\n"
        "axes.unicode_minus: False\nfigure.dpi: 100\nsavefig.dpi: 100\nfigure.max_open_warning: 8\n"
    )
    # The list names fonts of all systems; which of them are missing here interests nobody.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    os.environ["MPLCONFIGDIR"] = str(settings)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"


def _cut_long_values(formatter: Any) -> None:
    """Shows the beginning and the end of a value whose text is long; the reader would keep no more of it."""
    whole = formatter.format

    def cut(value: Any, **options: Any) -> Any:
        data, metadata = whole(value, **options)
        text = data.get("text/plain")
        if isinstance(text, str) and len(text) > _VALUE_CHARACTERS:
            half = _VALUE_CHARACTERS // 2
            left_out = len(text) - _VALUE_CHARACTERS
            data["text/plain"] = f"{text[:half]}\n[… {left_out:,} characters left out …]\n{text[-half:]}"
        return data, metadata

    formatter.format = cut


def main() -> None:
    """Starts the kernel and serves it until it is killed."""
    folder = Path(sys.argv[1])
    os.chdir(folder)  # the path of a socket has at most 107 bytes, so it is a relative one
    setup: dict[str, str] = json.loads(Path("kernel.json").read_text())
    os.environ.update({"IPYTHONDIR": str(folder), "JUPYTER_PLATFORM_DIRS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    for threads in ("OPENBLAS", "OMP", "MKL", "NUMEXPR"):
        os.environ[f"{threads}_NUM_THREADS"] = "1"
    _settings_of_plots(folder)
    _hide("debugpy", "jedi")

    from ipykernel import iostream, kernelapp
    from traitlets.config import Config
    from zmq.constants import SocketOption, SocketType

    class PacedStream(iostream.OutStream):
        """Standard output that waits for its reader, so that a flood fills no memory.

        A forked process writes into the pipe that the kernel watches for output of programs; ipykernel would use TCP.
        """

        def write(self, string: str) -> int:
            size = len(string)
            if not self._is_master_process():
                os.write(self._original_stdstream_fd, string.encode("utf-8", "backslashreplace"))
                return size
            for start in range(0, size, _PENDING_CHARACTERS):
                piece = string[start : start + _PENDING_CHARACTERS]
                super().write(piece)
                self.pending = getattr(self, "pending", 0) + len(piece)
                if self.pending >= _PENDING_CHARACTERS:
                    self.flush()
                    self.pending = 0
            return size

        def flush(self) -> None:
            if self._is_master_process():
                super().flush()

    class PublisherWithoutTCP(iostream.IOPubThread):
        """Publishes what this process says, and listens to no other."""

        def _setup_pipe_in(self) -> None:
            self._pipe_flag = False

    class App(kernelapp.IPKernelApp):
        """ipykernel without its settings files, heartbeat and connection file: the server knows all it needs."""

        def load_config_file(self, *arguments: Any, **options: Any) -> None:
            """Reads nothing: a settings file in the working directory would be code that outlives its kernel."""

        def init_connection_file(self) -> None:
            """Takes the addresses the server knows."""
            self.transport, self.ip = "ipc", "k"
            self.shell_port, self.iopub_port, self.control_port, self.stdin_port = 1, 2, 3, 4
            self.session.key = setup["key"].encode()

        def init_heartbeat(self) -> None:
            """The server sees the process itself."""

        def write_connection_file(self, **options: Any) -> None:
            """Nobody else may find this kernel."""

        def _bind_socket(self, s: Any, port: int) -> int:
            """A full queue makes the sender wait; by default messages would vanish, the last one too."""
            if s.type == SocketType.XPUB:
                s.setsockopt(SocketOption.SNDHWM, 16)
                s.setsockopt(SocketOption.XPUB_NODROP, 1)
            return super()._bind_socket(s, port)

    config = Config()
    config.InteractiveShell.colors = "nocolor"
    config.InteractiveShell.xmode = "Plain"
    config.InteractiveShell.cache_size = 100
    config.HistoryManager.enabled = False
    config.IPCompleter.use_jedi = False
    config.InlineBackend.figure_formats = {"png"}
    config.InlineBackend.print_figure_kwargs = {"bbox_inches": "tight", "dpi": 100}
    vars(iostream)["OutStream"] = PacedStream  # the application imports it by this name
    vars(kernelapp)["IOPubThread"] = PublisherWithoutTCP
    app = App.instance(config=config, log_level=50)
    app.initialize([])
    shell: Any = app.shell
    _cut_long_values(shell.display_formatter)
    os.chdir(setup["data"])
    sys.path.append(setup["data"])
    del sys.argv[1:]
    null = os.open(os.devnull, os.O_WRONLY)
    streams: tuple[Any, ...] = (sys.stdout, sys.stderr)
    for stream in streams:
        os.dup2(null, stream._original_stdstream_copy)
    app.start()


main()
