"""What strangers are told: no host, no places on this machine; everything else as it is."""

import copy

import pytest

from diffusers_geometry.disclosure import model_name, public_document, public_text


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/a/b/model", "model"),
        ("/home/a/model/", "model"),
        ("audit /x/m --prompts ~/p.txt --labels=../l/x.txt org/model", "audit m --prompts p.txt --labels=x.txt org/model"),
        ("no such file: '/home/a b/my files/x y.json'", "no such file: 'x y.json'"),
        ("C:\\Users\\me\\m.bin and D:/x/y and \\\\server\\share\\z", "m.bin and y and z"),
        ("file:///home/x/y.txt (see /a/b/c).", "y.txt (see c)."),
        ('at /usr/lib/x.py:33: bad, "~other/deep/place"', 'at x.py:33: bad, "place"'),
    ],
)
def test_of_a_path_the_last_part_is_left(text, public):
    assert public_text(text) == public
    assert public_text(public) == public


@pytest.mark.parametrize(
    "text",
    ["https://host:80/a/b and http://h", "org/model@main", "examples/zoo/digits", "|(H_c - H_u)(s_c - s_u)| / |x|",
     "and/or, 1/2 // x", "hf-geometry audit --repeat FOLDER", ". and .. and ~ and /"],
)  # fmt: skip
def test_what_is_no_place_stays(text):
    assert public_text(text) == text


def test_a_document_keeps_everything_but_host_and_places():
    document = {
        "model": {"name": "/home/a/m", "weights": {"unet/x.safetensors": "ab"}},
        "request": {"prompts": ["/home/a/in/a/prompt", 3], "call": {"negative_prompt": "/b/c", "mask": "/b/c", "steps": [1, 0.5]}},
        "prompts": [{"prompt": "/home/a/in/a/prompt", "note": "/b/c"}], "units": [{"prompt": 0, "error": {"message": "in ~/x/y"}}],
        "run": {"host": "secret-host", "seconds": None},
    }  # fmt: skip
    before = copy.deepcopy(document)
    assert public_document(document) == {
        "model": {"name": "m", "weights": {"unet/x.safetensors": "ab"}},
        "request": {"prompts": ["/home/a/in/a/prompt", 3], "call": {"negative_prompt": "/b/c", "mask": "c", "steps": [1, 0.5]}},
        "prompts": [{"prompt": "/home/a/in/a/prompt", "note": "c"}], "units": [{"prompt": 0, "error": {"message": "in y"}}],
        "run": {"host": None, "seconds": None},
    }  # fmt: skip
    assert document == before


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("org/model", "5e1c" * 10, "org/model"), (f"org/model@{'5e1c' * 10}", None, f"org/model@{'5e1c' * 10}"),
        ("/home/a/model/", None, "model"), ("a/model", None, "model"), ("C:\\a\\model", None, "model"),
        ("the bundled digits", None, "the bundled digits"), (".", None, "model"), (None, None, "model"),
    ],
)  # fmt: skip
def test_a_model_is_named_as_others_know_it(name, revision, said):
    assert model_name({"model": {"name": name, "revision": revision}}) == said
