import fcntl
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import trainer.family
from core.countdown import WORDS, encode, problems, verify
from trainer.family import Family, default_cache_root, embedded_family
from trainer.pretrain import Recipe, Shape, build_model, larger_first, make_family, read_traces

SMALL = Shape(layers=1, hidden=16, heads=1, intermediate=16, init_std=0.1)
QUICK = Recipe(learner=SMALL, explorer=SMALL, learner_steps=3, explorer_steps=3, batch=16, threads=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the quick family of seed 0."""
    root = tmp_path_factory.mktemp("cache")
    embedded_family(root, 0, recipe=QUICK)
    return root


@pytest.fixture
def own_cache(cache: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return shutil.copytree(cache, tmp_path / "cache")


def contents(family: Family) -> dict[str, bytes]:
    root = family.learner.parent
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_transformers_loads_both_models(tmp_path: Path) -> None:
    family = embedded_family(tmp_path, 0, recipe=Recipe(learner_steps=1, explorer_steps=1, batch=2))
    ids = torch.tensor([encode("8 5 9 7 = 15 :")])
    for folder, layers, hidden, heads in ((family.learner, 3, 96, 4), (family.explorer, 2, 64, 2)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.model_type == "qwen3"
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (layers, hidden)
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (heads, heads)
        assert model.config.head_dim == 32
        assert model.config.vocab_size == 59
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert model(ids).logits.isfinite().all()
        assert GenerationConfig.from_pretrained(folder).eos_token_id == WORDS.index("<eos>")


def test_tokenizer_reads_and_writes_the_words_of_countdown(cache: Path) -> None:
    prompt, answer = "8 5 9 7 = 15 :", "9 - 5 = 4 , 8 - 4 = 4 , 4 + 7 = 11"
    for folder in embedded_family(cache, 0, recipe=QUICK):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(prompt)["input_ids"]
        assert ids == encode(prompt)
        assert len(ids) == 7
        assert tokenizer.bos_token is None
        assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
        assert tokenizer.decode(encode(answer)) == answer
        assert tokenizer.decode([*encode(answer), tokenizer.eos_token_id], skip_special_tokens=True) == answer
        assert tokenizer.get_vocab() == {word: index for index, word in enumerate(WORDS)}
        with pytest.raises(Exception, match="Missing"):
            tokenizer("eleven")


def test_the_learner_is_larger_than_the_explorer_by_a_factor_of_three() -> None:
    sizes = [build_model(shape, Recipe()).num_parameters() for shape in (Recipe().learner, Recipe().explorer)]
    assert sizes == [375_168, 110_720]


def test_second_use_finds_the_first_one(cache: Path) -> None:
    said: list[str] = []
    family = embedded_family(cache, 0, recipe=QUICK, on_progress=lambda text, fraction: said.append(text))
    assert said == []
    assert family.learner.parent == family.explorer.parent
    assert family.learner.parent.parent == cache
    assert [path.name for path in cache.iterdir() if path.suffix == ".partial"] == []


def test_equal_seeds_give_equal_bytes(cache: Path, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # the caller's random numbers do not matter
    again = embedded_family(tmp_path, 0, recipe=QUICK)
    assert contents(again) == contents(embedded_family(cache, 0, recipe=QUICK))


def test_seed_and_recipe_name_the_directory(tmp_path: Path) -> None:
    least = msgspec.structs.replace(QUICK, learner_steps=1, explorer_steps=1, batch=2)
    other = msgspec.structs.replace(least, batch=3)
    families = [embedded_family(tmp_path, seed, recipe=recipe) for seed, recipe in ((0, least), (1, least), (0, other))]
    assert len({family.learner.parent.name for family in families}) == 3
    assert len({contents(family)["learner/model.safetensors"] for family in families}) == 3


def test_progress_rises_to_one_and_the_loss_falls(tmp_path: Path) -> None:
    said: list[tuple[str, float]] = []
    recipe = msgspec.structs.replace(
        QUICK, learner_steps=40, explorer_steps=20, warmup=5, learner_rate=0.02, explorer_rate=0.02
    )
    embedded_family(tmp_path, 0, recipe=recipe, on_progress=lambda text, fraction: said.append((text, fraction)))
    fractions = [fraction for _, fraction in said]
    assert len(said) == 60
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)
    assert said[0][0].startswith("pre-training the learner: step 1 of 40, loss 4.")
    learner_loss, explorer_loss = (float(said[row][0].split()[-1]) for row in (39, 59))
    assert learner_loss < 2.5
    assert explorer_loss < 3.0
    assert said[59][0].startswith("distilling the explorer: step 20 of 20")


def test_the_caller_keeps_its_threads_and_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(7)
    threads, expected = torch.get_num_threads(), torch.random.get_rng_state()
    recipe = msgspec.structs.replace(QUICK, threads=threads + 1)
    embedded_family(tmp_path, 0, recipe=recipe)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_every_trace_is_a_correct_answer_to_a_pretraining_problem() -> None:
    traces = read_traces(seed=3)
    prompts = set()
    for row in traces.ids.tolist():
        words = [WORDS[index] for index in row]
        prompt, response = " ".join(words[: traces.prompt_length]), " ".join(words[traces.prompt_length :])
        assert verify(prompt, response) == (1, "ok")
        assert response.endswith(" <eos>")
        assert larger_first(response.removesuffix(" <eos>")) == response.removesuffix(" <eos>")
        prompts.add(prompt)
    assert prompts == {problem.prompt for problem in problems("pretrain", 3)}
    assert not prompts & {problem.prompt for split in ("train", "eval") for problem in problems(split, 3)}


def test_larger_first_turns_sums_only() -> None:
    assert larger_first("2 + 5 = 7 , 7 - 3 = 4 , 4 + 4 = 8") == "5 + 2 = 7 , 7 - 3 = 4 , 4 + 4 = 8"


def spoil_weights(folder: Path) -> None:
    file = folder / "explorer" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, "model.safetensors is not the file that was made"),
        (lambda folder: (folder / "learner" / "tokenizer.json").unlink(), "lack .*tokenizer.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no readable manifest"),
    ],
)
def test_a_spoilt_cache_is_refused(own_cache: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = embedded_family(own_cache, 0, recipe=QUICK).learner.parent
    spoil(folder)
    with pytest.raises(ValueError, match=f"{message}.*remove .*{folder.name} and it is made again"):
        embedded_family(own_cache, 0, recipe=QUICK)


def test_what_a_killed_process_left_is_replaced(cache: Path, tmp_path: Path) -> None:
    name = embedded_family(cache, 0, recipe=QUICK).learner.parent.name
    half_done = tmp_path / f"{name}.partial" / "learner"
    half_done.mkdir(parents=True)
    (half_done / "stray.bin").write_bytes(b"half")
    again = embedded_family(tmp_path, 0, recipe=QUICK)
    assert contents(again) == contents(embedded_family(cache, 0, recipe=QUICK))


def test_a_failure_leaves_no_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *rest: object) -> None:
        (folder / "learner").mkdir(parents=True)
        raise OSError("no space left on device")

    monkeypatch.setattr(trainer.family, "make_family", fail)
    with pytest.raises(OSError, match="no space"):
        embedded_family(tmp_path, 0, recipe=QUICK)
    monkeypatch.setattr(trainer.family, "make_family", make_family)
    assert embedded_family(tmp_path, 0, recipe=QUICK).learner.is_dir()


def test_of_two_at_once_one_makes_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def count(folder: Path, *rest: object) -> None:
        made.append(folder)
        make_family(folder, *rest)

    monkeypatch.setattr(trainer.family, "make_family", count)
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(embedded_family, tmp_path, 0, recipe=QUICK) for _ in range(2))
        assert first.result(timeout=120) == second.result(timeout=120)
    assert len(made) == 1


def test_a_lock_held_too_long_is_an_error_that_names_it(cache: Path, tmp_path: Path) -> None:
    name = embedded_family(cache, 0, recipe=QUICK).learner.parent.name
    lock, said = tmp_path / f"{name}.lock", []
    with lock.open("a") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match=f"{lock.name}.*S2LPO_CACHE"):
            embedded_family(
                tmp_path, 0, recipe=QUICK, lock_timeout_s=0.3, on_progress=lambda text, fraction: said.append(text)
            )
    assert "waiting for another process that makes the embedded models" in said


def test_the_cache_is_in_the_home_directory_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("S2LPO_CACHE", str(tmp_path / "models"))
    assert default_cache_root() == tmp_path / "models"
    monkeypatch.delenv("S2LPO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_root() == tmp_path / ".cache" / "s2l-po"
