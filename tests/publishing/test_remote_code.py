"""A model whose code travels along, in processes that don't find zoobot_hf."""

import json

import pytest
import torch
from processes import run_without

from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.publishing.hub import MODEL_CARD, push_folder
from zoobot_hf.publishing.model_card import ModelCardFacts, render_model_card
from zoobot_hf.publishing.run_folder import save_model

CLASSIFY = """
import json
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

code, name, path = sys.argv
model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
assert model.encoder_blocks() is not None
with torch.no_grad():
    logits = model(**processor([Image.open(path)])).logits
    embedding = AutoModel.from_pretrained(name, trust_remote_code=True)(**processor([Image.open(path)])).embeddings
classify = pipeline("image-classification", model=name, trust_remote_code=True, device="cpu")
print(json.dumps([logits.tolist(), embedding.tolist(), classify(path)]))
"""


def push(model, folder, repo_id, token, *, include_code):
    save_model(folder, model, ZoobotImageProcessor(32))
    facts = ModelCardFacts(
        model_name=folder.name,
        encoder="tiny",
        labels=model.config.label_names,
        problem_type=model.config.problem_type,
        image_size=32,
        stages=(),
    )
    (folder / MODEL_CARD).write_text(render_model_card(facts))
    push_folder(folder, repo_id, include_code=include_code, token=token)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("layer_norm_model", ("zoobot_hf", "timm")),
        ("batch_norm_model", ("zoobot_hf", "timm")),
        ("vit_model", ("zoobot_hf", "timm")),
        ("timm_model", ("zoobot_hf",)),
    ],
)
def test_a_model_with_its_code_loads_without_zoobot_hf(
    request, name, hidden, hub_token, repo_id, galaxy_images, tmp_path
):
    model = request.getfixturevalue(name)
    push(model, tmp_path / "out", repo_id, hub_token, include_code=True)
    galaxy_images[1].save(tmp_path / "galaxy.png")
    output = run_without(hidden, CLASSIFY, repo_id, tmp_path / "galaxy.png", HF_HOME=str(tmp_path / "home"))
    logits, embedding, answers = json.loads(output.splitlines()[-1])
    pixel_values = ZoobotImageProcessor(32)([galaxy_images[1]])["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixel_values).logits
        expected_embedding = model.zoobot(pixel_values).embeddings
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(embedding), expected_embedding, atol=1e-4, rtol=0)
    probabilities = dict(zip(("not ring", "ring"), expected.softmax(-1)[0].tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(probabilities, abs=1e-4)


@pytest.mark.slow
def test_no_code_of_a_repository_runs_unasked(batch_norm_model, hub_token, repo_id, tmp_path):
    push(batch_norm_model, tmp_path / "out", repo_id, hub_token, include_code=True)
    script = """
        from transformers import AutoModelForImageClassification
        try:
            AutoModelForImageClassification.from_pretrained(sys.argv[1])
        except (ValueError, OSError) as error:
            print(error)
    """
    output = run_without(("zoobot_hf",), script, repo_id, HF_HOME=str(tmp_path / "home"))
    assert "trust_remote_code=True" in output
    assert not (tmp_path / "home" / "modules").exists()
