"""Python files as a checkpoint carries them: beside each other, every import between them relative.

`code_bundle` says what to carry, `trusted_code` reads it back.  transformers copies what one pattern matches, line by line,
``from .name import``; so modules of this package and files of a user are made flat here, and their imports of each other
rewritten.  A module that lies in a folder of the package is carried as ``folder_module.py``.
"""

import ast
import functools
import importlib.util
import io
import re
import sys
import sysconfig
import tokenize
from collections.abc import Collection, Sequence
from pathlib import Path

from ..parts.classes import CODE_ENTRY
from .code_folder import HERE, PACKAGE, THIN_FOLDER, own_modules, read_entry

_IMPORT = re.compile(r"^(\s*)from (\.+)([\w.]+) import", re.M)
# What transformers takes for an import, in docstrings too.
_SEEN_BY_TRANSFORMERS = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", re.M)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")  # an access token of the Hub
# Calls that no definition needs: a file that makes one while it is imported is a program.
_PROGRAM_CALLS = frozenset([
    "compose", "fit", "from_native", "from_pretrained", "generate", "hf_hub_download", "load_dataset", "main", "parse_args",
    "push_to_hub", "save_pretrained", "snapshot_download", "system", "train", "urlopen",
])  # fmt: skip
_HARMLESS_CALLS = frozenset(["setdefault", "update", "append", "add", "getLogger", "filterwarnings", "simplefilter"])
# What a checkpoint carries by a thin file with the same names: in any case, or unless it names one of these.  Guards that
# arrive inside the code that they guard protect nobody; what composes and exports needs the package.
_UNLESS: dict[str, tuple[str, ...]] = {
    "checkpoints_loading": ("references",), "parts_stored_adapters": ("adapters",), "processing_sounds": ("audio",),
    "processing_texts": ("text",), "processing_video": ("video",),
    "encoders_grids": ("grids", "join", "layer_features", "positions", "tiles", "video"),
}  # fmt: skip
# Thin files that are carried as one, with all of their names: none of them imports another module that imports one.
_JOINED = (
    "checkpoints_described", "checkpoints_trusted_code", "encoders_continuing", "encoders_feature_layout",
    "encoders_feature_memo", "encoders_grids", "encoders_item_sizes", "encoders_unused_layers", "language_model_label_loss",
    "language_model_refusals", "processing_addresses", "processing_assistant_turns", "processing_image_bounds",
    "processing_sounds", "processing_texts", "processing_video",
)  # fmt: skip
JOINT = "thin_files"
THIN = {path.stem: frozenset(_UNLESS.get(path.stem, ())) for path in sorted(THIN_FOLDER.glob("[!_]*.py"))}
# What only a checkpoint carries that names one of these; nothing else imports it.
OPTIONAL: dict[str, frozenset[str]] = {
    "encoders_joining": frozenset(["join"]),
    "encoders_said_of_items": frozenset(["positions", "layer_features"]),
    "language_model_inner_features": frozenset(["layer_features", "merge"]),
    "language_model_masks": frozenset(["mask"]),
    **dict.fromkeys(("language_model_position_rules", "language_model_positions"), frozenset(["positions"])),
    "language_model_text_head": frozenset(["TextModelWithHead"]),
    "conversion_steps": frozenset(["native steps"]),
    **dict.fromkeys(("processing_native_call", "processing_native_texts"), frozenset(["native processor"])),
    **dict.fromkeys(("encoders_tiles", "processing_tiles"), frozenset(["tiles"])),
    "processing_own_processors": frozenset(["own processors"]),
    "projectors_native": frozenset(["native"]),
    "projectors_qformer": frozenset(["qformer"]),
    "projectors_reductions": frozenset(["frame_stack", "pixel_shuffle"]),
    "projectors_resampler": frozenset(["resampler"]),
    "projectors_windows": frozenset(["avg_pool", "conv"]),
}


def is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package, which a checkpoint names but does not carry."""
    places = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    path = path.resolve()
    inside = any(path.is_relative_to(Path(place).resolve()) for place in places if place)
    beside_packages = any(True for parent in path.parents for _ in parent.glob("*.dist-info"))  # `pip install --target`
    return inside or beside_packages or bool({"site-packages", "dist-packages"} & set(path.parts))


def own_file(stem: str) -> Path:
    """The file of a module of this package, by the name under which a checkpoint carries it."""
    return HERE.joinpath(*own_modules().get(stem, stem).split(".")).with_suffix(".py")


def own_stem(path: Path) -> str | None:
    """The name under which a checkpoint carries a file of this package; None for a file that lies elsewhere."""
    path = path.resolve()
    return "_".join(path.relative_to(HERE).with_suffix("").parts) if path.is_relative_to(HERE) else None


def bundled(text: str, module: str) -> tuple[str, set[str]]:
    """The text of a module as a checkpoint carries it, and the names of the files that it imports.

    Each relative import names a file beside it, on one line.  Comments stay here, docstrings but for the first paragraph of
    the module's (it says what a reader who is to trust the code wants to know), and of blank lines all but one.
    """
    found = set()

    def flat(match: re.Match) -> str:
        stem = "_".join([*module.split(".")[: -len(match[2])], *match[3].split(".")])
        found.add(stem)
        return f"{match[1]}from .{stem} import"

    lines, before, silent = text.splitlines(keepends=True), tokenize.NEWLINE, False
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    inside = {row for token in tokens for row in range(token.start[0], token.end[0])}  # of texts over several lines
    for place, token in enumerate(tokens):
        (row, column), last = token.start, token.end[0]
        if token.type == tokenize.COMMENT:
            kept = lines[row - 1][:column].rstrip()
            lines[row - 1] = f"{kept}\n" if kept else ""
        elif token.type == tokenize.STRING and (before == tokenize.INDENT or place == 0):  # a docstring
            behind = next(other.type for other in tokens[place + 2 :] if other.type != tokenize.COMMENT)
            if silent and behind != tokenize.DEDENT:  # which is not all of its body
                lines[row - 1 : last] = [""] * (last - row + 1)
            elif "\n\n" in token.string:
                end = row + token.string.split("\n\n")[0].count("\n")  # the last line of its first paragraph
                lines[end - 1 : last] = [lines[end - 1].rstrip("\n") + '"""\n', *[""] * (last - end)]
        elif re.match(r"\s*(async def|def|class) \w+", token.line):
            silent = True
        before = before if token.type == tokenize.COMMENT else token.type
    for node in filter(lambda node: isinstance(node, ast.ImportFrom), ast.parse(text).body):  # on one line each
        lines[node.lineno - 1 : node.end_lineno] = [f"{ast.unparse(node)}\n", *[""] * (node.end_lineno - node.lineno)]
    carried: list[str] = []
    for row, line in enumerate(lines, 1):
        # Of several empty lines the first stays, and none below the head of a class.
        surplus = line == "\n" and carried and (carried[-1] == "\n" or carried[-1].endswith(":\n"))
        if row in inside or not surplus:
            carried += [line] if line else []
    return _IMPORT.sub(flat, "".join(carried)), found


def _as_one(texts: Sequence[str]) -> str:
    """Bundled texts one after the other, in front of them what they import, each name once."""
    imported: dict[str, set[str]] = {}
    bodies = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                origin, _, names = lines[node.lineno - 1].strip().rpartition("import ")
                imported.setdefault(origin or f"import {names}", set()).update(names.split(", ") if origin else ())
                lines[node.lineno - 1] = ""
        bodies.append("".join(lines))
    head = [
        f"{start}import {', '.join(sorted(names))}" if names else start for start, names in sorted(imported.items())
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*head, "", *bodies]))


class CodeFiles:
    """The files that a checkpoint carries, collected from the roots given and from what they import.

    Args:
        roots: modules of this package, which a checkpoint needs to load and to save itself.
        needs: what the checkpoint names, see `THIN` and `OPTIONAL`; names of modules that it needs whole among it.

    Raises:
        ValueError: from every method, a file that cannot be carried; names the file, the line and the remedy.
    """

    def __init__(self, roots: tuple[str, ...], needs: Collection[str] = ()):
        self._roots = [*roots, *(stem for stem, names in OPTIONAL.items() if not names.isdisjoint(needs))]
        self._whole = {stem for stem, names in THIN.items() if stem in needs or not names.isdisjoint(needs)}
        self.joint: list[str] = []  # thin files that are carried as one
        self.added: set[str] = set()  # modules of this package that only a user's file needs, or needs whole
        self.own = self._collected()  # texts of modules of this package by the stem under which they are carried
        self.users: dict[str, str] = {}  # texts of a user's files likewise
        self._stems: dict[Path, str] = {}
        self._package = frozenset(self.own)

    def source(self, stem: str) -> Path:
        """Where the text lies that a checkpoint carries as a module of this package."""
        thin = stem in THIN and stem not in self._whole
        return THIN_FOLDER / f"{stem}.py" if thin else own_file(stem)

    def add_own(self, stem: str) -> str:
        """Take a module of this package, and all that it imports, for a user's file: it may use any name of it."""
        self._carry_whole(stem, set())
        self._roots += [stem, *self.added]
        self.own = self._collected()
        return stem

    def _carry_whole(self, stem: str, seen: set[str]) -> None:
        """Replace thin files by whole ones in a module and in what only it imports."""
        if stem in seen or stem in self._whole or (stem in self._package and stem not in THIN):
            return  # the modules of every checkpoint are made for thin neighbours
        seen.add(stem)
        self.added.add(stem)
        self._whole |= {stem} & THIN.keys()
        for imported in self._bundled(stem)[1]:
            self._carry_whole(imported, seen)

    def _collected(self) -> dict[str, str]:
        texts: dict[str, str] = {}
        pending = list(self._roots)
        while pending:
            if (stem := pending.pop()) not in texts:
                texts[stem], imported = self._bundled(stem)
                pending += imported
        return self._with_joint(texts)

    def _with_joint(self, texts: dict[str, str]) -> dict[str, str]:
        """Texts of which the small thin ones are one."""
        stems = self.joint = [stem for stem in _JOINED if stem in texts and stem not in self._whole]
        imports = re.compile(rf"^(\s*from )\.(?:{'|'.join(stems)}) import", re.M)
        joint = _as_one([texts[stem] for stem in stems])
        others = {stem: text for stem, text in texts.items() if stem not in stems} | ({JOINT: joint} if stems else {})
        return {stem: imports.sub(rf"\1.{JOINT} import", text) if stems else text for stem, text in others.items()}

    def _bundled(self, stem: str) -> tuple[str, set[str]]:
        path = self.source(stem)
        if not path.is_file():
            raise ValueError(f"The code of a checkpoint needs {stem}.py of {PACKAGE}, which this version lacks.")
        return bundled(path.read_text(encoding="utf-8"), ".".join(path.relative_to(HERE).with_suffix("").parts))

    def add_file(self, path: Path, why: str) -> str:
        """Take a user's file and the files of the user that it imports; returns the stem under which it is carried."""
        path = path.resolve()
        if (own := own_stem(path)) is not None:
            return self.add_own(own)
        if path.stem in read_entry(path.parent).get("package", []):  # a copy of one of ours, in a checkpoint's folder
            return self.add_own(path.stem)
        if path not in self._stems:
            stem = self._stems[path] = self._free_stem(path)
            self.users[stem] = ""  # first, for its imports may lead back to it
            text = self.users[stem] = self._rewritten(path, why)
            twin = next((other for other, same in self.users.items() if same == text and other != stem), None)
            if twin is not None and text:  # a file and its copy in a checkpoint
                del self.users[stem]
                self._stems[path] = twin
        return self._stems[path]

    def _free_stem(self, path: Path) -> str:
        folder = re.sub(r"[^0-9a-zA-Z_]", "_", path.parent.name)
        stem = re.sub(r"\W", "_", path.parent.name if path.stem == "__init__" else path.stem)
        taken = {JOINT, *own_modules(), *self.users, CODE_ENTRY, PACKAGE}
        candidates = [stem, f"{folder}_{stem}", f"users_{stem}", *(f"users_{stem}_{i}" for i in range(2, 100))]
        return next(name for name in candidates if name not in taken and name.isidentifier())

    def _rewritten(self, path: Path, why: str) -> str:
        text = path.read_text(encoding="utf-8")
        if _TOKEN.search(text):
            raise ValueError(f"{path} ({why}) holds an access token: remove it before the file is shared.")
        tree = ast.parse(text)
        if (program := next(filter(_is_program, _top_statements(tree.body)), None)) is not None:
            raise ValueError(
                f"{path}:{program.lineno} ({why}) does more than define: `{ast.unparse(program):.60}` would run wherever the "
                'checkpoint is loaded. Put it under `if __name__ == "__main__":`, or move the definitions into a file of '
                "their own."
            )
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        edits = [(node, self._relative(node, path)) for node in imports]
        # From the end, so that the numbers of lines before stay right.
        for node, lines in sorted(edits, key=lambda edit: -edit[0].lineno):
            if lines is not None:
                text = _replaced(text, node, lines, path)
        # What transformers' pattern finds must be what Python finds: it would look for files that a docstring names.
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level == 1]
        seen = {a or b for a, b in _SEEN_BY_TRANSFORMERS.findall(text)}
        if surplus := sorted(seen - {node.module for node in nodes}):
            raise ValueError(
                f"{path} has a line of text that reads like an import of {surplus}: transformers would look for that file. "
                "Reword the docstring or the string."
            )
        return text

    # ---- imports

    def _relative(self, node: ast.Import | ast.ImportFrom, path: Path) -> list[str] | None:
        """The lines that stand for an import in the carried file; None where it stays as it is."""
        if isinstance(node, ast.Import):
            return self._relative_import(node, path)
        module = node.module or ""
        if node.level == 0 and module.split(".")[0] == PACKAGE:
            return self._from_package(node, path)
        # The module's path without the ending, for a relative import; a user's package is looked into likewise.
        base = path.parents[node.level - 1] / Path(*module.split(".")) if node.level else None
        target = _module_file(base) if base is not None else _users_file(module, path.parent)
        if base is None and target is None:
            return None
        if base is None and target is not None and target.stem == "__init__":
            base = target.parent
        lines, why = [], f"imported by {path.name}"
        for alias in node.names:
            inner = _module_file(base / alias.name) if base is not None and alias.name != "*" else None
            if inner is not None:
                lines.append(f"from . import {self.add_file(inner, why)} as {alias.asname or alias.name}")
            elif target is not None:
                lines.append(f"from .{self.add_file(target, why)} import {ast.unparse(alias)}")
            else:
                raise ValueError(f"{path}:{node.lineno} imports {alias.name!r} of a package that has no file for it.")
        return lines

    def _relative_import(self, node: ast.Import, path: Path) -> list[str] | None:
        lines, why = [], f"imported by {path.name}"
        for alias in node.names:
            own = alias.name.split(".")[0] == PACKAGE
            target = None if own else _users_file(alias.name, path.parent)
            if own or (target is not None and "." in alias.name):
                raise ValueError(
                    f"{path}:{node.lineno} uses `import {alias.name}`, which cannot be carried: write `from {alias.name} "
                    "import name` instead."
                )
            if target is not None:
                lines.append(f"from . import {self.add_file(target, why)} as {alias.asname or alias.name}")
            else:
                lines.append(f"import {ast.unparse(alias)}")
        return lines if any(line.startswith("from ") for line in lines) else None

    def _from_package(self, node: ast.ImportFrom, path: Path) -> list[str]:
        """`from cornstarch_hf import X`, or of one of its folders or modules, from the checkpoint's own copy."""
        place = (node.module or "").replace(".", "_").removeprefix(PACKAGE).removeprefix("_")
        lines = []
        for alias in node.names:
            stem = f"{place}_{alias.name}".removeprefix("_")
            if place not in own_modules() and stem in own_modules():
                lines.append(f"from . import {self.add_own(stem)} as {alias.asname or alias.name}")
                continue
            home = place if place in own_modules() else own_module_of(alias.name, place)
            if home is None or alias.name == "*":
                raise ValueError(f"{path}:{node.lineno} imports {alias.name!r} of {PACKAGE}: name what is needed.")
            lines.append(f"from .{self.add_own(home)} import {ast.unparse(alias)}")
        return lines


@functools.cache
def own_module_of(name: str, folder: str = "") -> str | None:
    """The running code's module, of the whole package or of one of its folders, that defines a name at its top."""
    pattern = re.compile(rf"^(?:class|def) {re.escape(name)}\b|^{re.escape(name)}\b\s*(?::[^=\n]+)?=", re.M)
    stems = [stem for stem in own_modules() if stem.startswith(f"{folder}_" if folder else "")]
    return next((stem for stem in stems if pattern.search(own_file(stem).read_text(encoding="utf-8"))), None)


def _module_file(base: Path) -> Path | None:
    """The file of a module by its path without the ending; None if there is none."""
    return next(filter(Path.is_file, (base.with_name(base.name + ".py"), base / "__init__.py")), None)


def _users_file(name: str, folder: Path) -> Path | None:
    """The user's own file that an absolute import means; None for an installed or built-in module."""
    running = getattr(sys.modules.get(name), "__file__", None)  # wherever it was imported from, that is what runs
    path = Path(running) if running is not None else _module_file(folder / Path(*name.split(".")))
    if path is None and name.split(".")[0] not in sys.stdlib_module_names:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        path = Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
    return None if path is None or path.suffix != ".py" or is_installed(path) else path


def _replaced(text: str, node: ast.Import | ast.ImportFrom, new: list[str], path: Path) -> str:
    """The text with one import statement replaced by lines of the same indentation."""
    lines = text.splitlines(keepends=True)
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before = lines[first].encode()[: node.col_offset].decode()  # ast counts columns in bytes
    after = lines[last].encode()[node.end_col_offset :].decode()
    if before.strip() or after.strip()[:1] not in ("", "#"):
        raise ValueError(f"{path}:{node.lineno}: put this import on a line of its own, so that it can be carried.")
    lines[first : last + 1] = ["".join(f"{before}{line}\n" for line in new)]
    return "".join(lines)


# ---- programs: files that do more than define and register when they are imported


def top_calls(tree: ast.Module) -> list[ast.Call]:
    """Calls that stand alone at the top of a file, outside of what only a program runs."""
    statements = _top_statements(tree.body)
    return [node.value for node in statements if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]


def _top_statements(body: list[ast.stmt]) -> list[ast.stmt]:
    found: list[ast.stmt] = []
    for node in body:
        # What only a program runs is left out; its `else` is not.
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            found += _top_statements(node.orelse)
        elif isinstance(node, (ast.If, ast.For)):
            found += _top_statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handlers = [statement for handler in node.handlers for statement in handler.body]
            found += _top_statements([*node.body, *handlers, *node.orelse, *node.finalbody])
        else:
            found.append(node)
    return found


def _is_program(node: ast.stmt) -> bool:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass, ast.Raise)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name = called_name(node.value)
        return not (name.startswith("register") or name in _HARMLESS_CALLS)
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Assert, ast.Delete)):
        return any(isinstance(inner, ast.Call) and called_name(inner) in _PROGRAM_CALLS for inner in ast.walk(node))
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return not (text or isinstance(node, definitions))


def called_name(call: ast.Call) -> str:
    """The last part of the name of what is called."""
    return str(getattr(call.func, "attr", None) or getattr(call.func, "id", ""))
