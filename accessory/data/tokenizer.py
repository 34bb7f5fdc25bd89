"""One tokenizer over sentencepiece models, ``tokenizer.json`` files and GGUF vocabularies.

Text never yields a control token. The backends hold a *text* model in which control entries cannot match, and
control tokens are reachable only by name through :meth:`Tokenizer.special`. No remote code is ever loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

_ALIASES = ("bos", "eos", "pad")


class Backend(Protocol):
    """What a vocabulary must offer."""

    vocab_size: int
    control: dict[str, int]  # control tokens by their string

    def encode(self, text: str, glued: bool) -> list[int]:
        """Ids of plain text; ``glued`` means that it continues a text, so no word-start prefix is put before it."""

    def decode(self, ids: list[int], glued: bool) -> str:
        """Text of ordinary ids; ``glued`` keeps a blank at its start."""

    def save(self, folder: Path) -> None:
        """Write the vocabulary's own file."""


class Tokenizer:
    """Text to ids and back. ``bos_id`` and ``eos_id`` are None where the vocabulary has none."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        unk_id: int | None = None,
    ) -> None:
        self._backend = backend
        self.vocab_size = backend.vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id: int = next((i for i in (pad_id, eos_id) if i is not None), 0)
        self._control_ids = frozenset(backend.control.values()) | {i for i in (bos_id, eos_id) if i is not None}
        self._control_ids -= {unk_id}
        self._names = {i: name for name, i in backend.control.items()}

    def encode(self, text: str, *, bos: bool = False, eos: bool = False, glued: bool = False) -> list[int]:
        """Ids of ``text``; strings that look like control tokens are encoded as the characters they are.

        ``glued`` is for text that continues an earlier piece: no word-start mark is put before it.
        """
        if not text.isascii():
            text.encode("utf-8")  # half a character (a surrogate alone) is a ValueError here and anything in a backend
        ids = self._backend.encode(text, glued) if text else []
        if not self._control_ids.isdisjoint(ids):
            found = sorted(self._control_ids.intersection(ids))
            raise ValueError(f"the vocabulary turns text into control tokens {found}: {text[:80]!r}")
        head = [self.special("bos")] if bos else []
        return head + ids + ([self.special("eos")] if eos else [])

    def after_blank(self, text: str) -> list[int]:
        """Ids of ``text`` where it follows a blank inside a longer text; its own leading blanks do not count."""
        text = text.lstrip(" ")
        if not text and self.marks_start:
            return []
        return self.encode(f" {text}", glued=True)

    @property
    def marks_start(self) -> bool:
        """Whether the vocabulary puts the mark of a word's start before every text (LLaMA's does)."""
        return self.encode("my darling") != self.encode("my darling", glued=True)

    def special(self, name: str) -> int:
        """Id of a control token by its string, or by ``bos``, ``eos``, ``pad``. ValueError when there is none."""
        if name in _ALIASES:
            found = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}[name]
            if found is None:
                raise ValueError(f"this vocabulary has no {name} token")
            return found
        if name not in self._backend.control:
            known = ", ".join(sorted(self._backend.control)[:20]) or "none"
            raise ValueError(f"no control token {name!r} in this vocabulary (known: {known})")
        return self._backend.control[name]

    def name(self, token_id: int) -> str | None:
        """The string of a control token, None for an ordinary one."""
        return self._names.get(token_id)

    def is_control(self, token_id: int) -> bool:
        """Whether ``decode`` leaves this id out."""
        return token_id < 0 or token_id in self._control_ids

    def decode(self, ids: Iterable[int], *, glued: bool = False) -> str:
        """Text of ``ids``; placeholders (negative ids) and control tokens are left out.

        ``glued`` is for ids that continue a text: their leading blank is kept where the vocabulary would drop it.
        """
        return self._backend.decode([i for i in map(int, ids) if not self.is_control(i)], glued)

    def stream(self) -> StreamDecoder:
        """A fresh incremental decoder."""
        return StreamDecoder(self)

    def save(self, folder: Path) -> None:
        """Write files that :func:`load` reads back from ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(folder)
        by_id = self._names
        named = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        config: dict[str, Any] = {f"{k}_token": by_id[v] for k, v in named.items() if v is not None and v in by_id}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))


class StreamDecoder:
    """Turns ids into text one at a time; a character whose bytes are not complete is held back."""

    _PATIENCE = 8  # an invalid byte run this long is shown as it is

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # the window [start, shown) is context for joining, [shown, end) is not yet shown
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty for control tokens and half characters."""
        if self._tokenizer.is_control(token_id):
            return ""
        self._ids.append(token_id)
        text = self._pending()
        if text.endswith("\ufffd") and len(self._ids) - self._shown < self._PATIENCE:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back at the end of the stream."""
        text = self._pending()
        self._start = self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._shown])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]


class _SentencePiece:
    """A sentencepiece ``.model`` file."""

    def __init__(self, proto: bytes) -> None:
        import sentencepiece.sentencepiece_model_pb2 as protos
        from sentencepiece import SentencePieceProcessor

        self._proto = proto
        self._full = SentencePieceProcessor(model_proto=proto)
        message: Any = protos
        model = message.ModelProto.FromString(proto)
        kinds = message.ModelProto.SentencePiece.Type
        self.control: dict[str, int] = {}
        for i, piece in enumerate(model.pieces):
            # A user-defined piece matches inside text; only runs of blanks are innocent, the rest mark structure.
            if piece.type == kinds.USER_DEFINED and piece.piece.replace("\u2581", " ").strip():
                piece.type = kinds.CONTROL
            if piece.type == kinds.CONTROL:
                self.control[piece.piece] = i
        self._head = SentencePieceProcessor(model_proto=model.SerializeToString())
        model.normalizer_spec.add_dummy_prefix = False
        self._glued = SentencePieceProcessor(model_proto=model.SerializeToString())
        self.vocab_size = int(self._full.get_piece_size())
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            None if i < 0 else int(i)
            for i in (self._full.bos_id(), self._full.eos_id(), self._full.pad_id(), self._full.unk_id())
        )

    def encode(self, text: str, glued: bool) -> list[int]:
        return list((self._glued if glued else self._head).encode(text))

    def decode(self, ids: list[int], glued: bool) -> str:
        return str((self._glued if glued else self._full).decode(ids))

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self._proto)


class _Json:
    """A ``tokenizer.json`` of the tokenizers library."""

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer as HfTokenizer

        self._text = text
        self._full = HfTokenizer.from_str(text)
        spec = json.loads(text)
        added = spec.get("added_tokens") or []
        unknown = spec["model"].get("unk_token")
        self.unk_id = self._full.token_to_id(unknown) if unknown else None
        self.control = {t["content"]: t["id"] for t in added if t["content"].strip()}
        spec["added_tokens"] = [t for t in added if not t["content"].strip()]
        spec["post_processor"] = None  # it would put control tokens around the text
        _make_unreachable(spec["model"], self.control, unknown)
        self._head = HfTokenizer.from_str(json.dumps(spec))
        _drop_prefix(spec)
        self._glued = HfTokenizer.from_str(json.dumps(spec))
        self.vocab_size = 1 + max(self._full.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str, glued: bool) -> list[int]:
        return list((self._glued if glued else self._head).encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int], glued: bool) -> str:
        return str(self._full.decode(ids, skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self._text, encoding="utf-8")


def _make_unreachable(model: dict[str, Any], control: Mapping[str, int], unknown: str | None) -> None:
    """Rename control strings in the vocabulary so that neither whole-word look-up nor Viterbi can find them."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score] by id
        for i, (piece, score) in enumerate(vocab):
            if piece in control and i != model.get("unk_id"):
                vocab[i] = [f"\uffff{i}\uffff", score]
        return
    for piece in control:
        if piece in vocab and piece != unknown:
            i = vocab.pop(piece)
            vocab[f"\uffff{i}\uffff"] = i


def _drop_prefix(spec: dict[str, Any]) -> None:
    """Switch off the word-start mark that SentencePiece-like tokenizers put before a text."""
    for key, nested in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        part = spec.get(key)
        if not part:
            continue
        steps = part[nested] if part["type"] == "Sequence" else [part]
        for step in steps:
            if step["type"] == "Metaspace":
                step["prepend_scheme"] = "never"
                step.pop("add_prefix_space", None)
            elif step["type"] == "ByteLevel":
                step["add_prefix_space"] = False
        kept = [s for s in steps if s["type"] != "Prepend"]
        spec[key] = {"type": "Sequence", nested: kept} if kept else None


def load(path: Path) -> Tokenizer:
    """A tokenizer from a ``.model``, ``tokenizer.json`` or ``.gguf`` file, or a folder that holds one of them."""
    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.model", "tokenizer.json")
        files = [path / n for n in names if (path / n).is_file()] or sorted(path.glob("*.gguf"))
        if not files:
            raise ValueError(f"no tokenizer.model, tokenizer.json or .gguf file in {path}")
        path = files[0]
    if not path.is_file():
        raise ValueError(f"no tokenizer file at {path}")
    if path.suffix == ".model":
        try:
            pieces = _SentencePiece(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{path} is no sentencepiece model ({error})") from None
        return Tokenizer(pieces, bos_id=pieces.bos_id, eos_id=pieces.eos_id, pad_id=pieces.pad_id, unk_id=pieces.unk_id)
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        fields = GGUFReader(path).fields
        return from_gguf({k: f.contents() for k, f in fields.items() if k.startswith("tokenizer.")})
    if path.suffix != ".json":
        raise ValueError(f"{path}: a tokenizer is a .model, .json or .gguf file")
    return _from_json(path)


def _from_json(path: Path) -> Tokenizer:
    backend = _Json(path.read_text(encoding="utf-8"))
    config_file = path.with_name("tokenizer_config.json")
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    guesses = {
        "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
        "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
        "pad": ("<pad>",),
    }
    ids: dict[str, int | None] = {}
    for kind, usual in guesses.items():
        token = config.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and token not in backend.control:
            raise ValueError(f"{config_file}: {kind}_token {token!r} is not an added token of {path.name}")
        # An explicit config without the token means that the vocabulary has none; without a config we go by custom.
        candidates = [token] if token is not None else [] if config else list(usual)
        ids[kind] = next((backend.control[t] for t in candidates if t in backend.control), None)
    return Tokenizer(backend, bos_id=ids["bos"], eos_id=ids["eos"], pad_id=ids["pad"], unk_id=backend.unk_id)


_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}| ?", r"|\p{N}{1,3}| ?")


def _pre_tokenizer(kind: str) -> dict[str, Any]:
    """The split rules that GGUF names only by a word."""
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    if kind == "gpt-2":
        return whole
    if kind == "smollm":
        return {"type": "Sequence", "pretokenizers": [digits, whole]}
    regex = {"qwen2": _QWEN2, "llama-bpe": _LLAMA3}.get(kind)
    if regex is None:
        raise ValueError(f"GGUF pre-tokenizer {kind!r} is not supported (smollm, gpt-2, qwen2, llama-bpe are)")
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**whole, "use_regex": False}]}


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """A byte-level BPE from GGUF metadata (``tokenizer.ggml.*`` as plain values: tokens, token_type, merges, ids)."""

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    if get("model") != "gpt2":
        raise ValueError(f"GGUF tokenizer model {get('model')!r} is not supported: only byte-level BPE ('gpt2') is")
    tokens: Sequence[str] = get("tokens")
    kinds: Sequence[int] = get("token_type") or [1] * len(tokens)
    added = [
        {
            "id": i, "content": t, "special": kinds[i] == 3, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False,
        }
        for i, t in enumerate(tokens)
        if kinds[i] in (3, 4)  # control and user-defined
    ]  # fmt: skip
    pre = get("pre", "gpt-2")
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": _pre_tokenizer(pre),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": [m.split(" ", 1) for m in get("merges")],
            "ignore_merges": pre == "llama-bpe",
            "byte_fallback": False,
        },
    }
    ids = {k: None if get(f"{n}_token_id") is None else int(get(f"{n}_token_id"))
           for k, n in (("bos_id", "bos"), ("eos_id", "eos"), ("pad_id", "padding"))}  # fmt: skip
    return Tokenizer(_Json(json.dumps(spec)), **ids)
