from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image

from zoobot_hf import FrozenStageArguments, FrozenStageTrainer
from zoobot_hf.publishing.hub import push_folder
from zoobot_hf.publishing.model_card import StageFacts
from zoobot_hf.publishing.run_folder import save_stage


def test_a_single_stage_is_pushed_in_one_commit(
    hub, hub_token, repo_id, batch_norm_model, processor, galaxy_images, galaxy_labels, tmp_path
):
    features = Features({"image": Image(), "label": ClassLabel(names=["not ring", "ring"])})
    galaxies = Dataset.from_dict({"image": galaxy_images[:8], "label": list(galaxy_labels[:8])}, features=features)
    arguments = FrozenStageArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=1, use_cpu=True, disable_tqdm=True
    )
    trainer = FrozenStageTrainer(
        batch_norm_model, arguments, processing_class=processor, train_dataset=galaxies, eval_dataset=galaxies
    )
    trainer.train()
    folder = Path(trainer.args.output_dir)
    stage = StageFacts(name="frozen", hyperparameters={"seed": trainer.args.seed})
    save_stage(folder, trainer.model, processor, stage=stage, history=trainer.state.log_history)
    push_folder(folder, repo_id, token=hub_token)
    assert set(hub.files(repo_id)) - {".gitattributes"} == {
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert len(hub.commits(repo_id)) == 2
    assert b"- seed: 42" in hub.files(repo_id)["README.md"]
    assert b"eval_loss" in hub.files(repo_id)["metrics.json"]
