"""What was saved here loads elsewhere: each test loads in another process, from disk and from a double of the Hub."""

import json

import diffusers
import pytest
import torch
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils
from pipelines.contract import CASES, ONE_EACH
from pipelines.tiny_ldm import tiny_unet
from pipelines.tiny_paella import tiny_paella_components, tiny_vqvae

import diffusers_ext
from diffusers_ext.registration import register
from diffusers_ext.training_utils.hub import export_self_contained

# Prepended to what the fresh processes run: load `where`, sample, and say what came out.
SAMPLE = """
import json, sys, torch
def report(pipe):
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="latent")
    print(json.dumps([type(pipe).__module__, type(pipe).__name__, pipe("a red circle", **call).images.tolist()]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny real pipeline on disk, in a folder with a blank and an umlaut, and what it samples."""
    folder = tmp_path_factory.mktemp("paella") / "my grüne paella"
    pipe = diffusers_ext.PaellaPipeline(**tiny_paella_components())
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="latent")
    return folder, pipe("a red circle", **call).images.tolist()


def reports(result) -> list:
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]


def fill_hub(hub, folder, repo="user/paella") -> None:
    hub.repos[repo] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.private[repo] = False


def test_recorded_names_are_a_file_format(saved):
    index = json.loads((saved[0] / "model_index.json").read_text())
    assert index["_class_name"] == "PaellaPipeline"
    assert index["unet"] == ["diffusers_ext", "PaellaUNet"]
    assert index["scheduler"] == ["diffusers_ext", "DiscreteRenoisingScheduler"]
    assert index["vqvae"] == ["diffusers", "VQModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModelWithProjection"]
    assert index["tokenizer"][0] == "transformers" and index["image_encoder"] == [None, None]
    for component, name in (("unet", "PaellaUNet"), ("vqvae", "VQModel")):
        assert json.loads((saved[0] / component / "config.json").read_text())["_class_name"] == name
    gumbel = diffusers_ext.PaellaPipeline(**tiny_paella_components(gumbel=True))
    assert list(gumbel.config["vqvae"]) == ["diffusers_ext", "GumbelVQModel"]


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("PaellaInpaintPipeline", "AutoPipelineForInpainting"),
        ("PaellaImg2ImgPipeline", "AutoPipelineForImage2Image"),
        ("PaellaImageVariationPipeline", None),
    ],
)
def test_one_checkpoint_loads_into_every_mode(saved, tmp_path, name, auto):
    """The modes record their own name and the same components; AutoPipeline finds the one of a task."""
    import diffusers

    cls = getattr(diffusers_ext, name)
    pipe = cls.from_pretrained(saved[0])
    pipe.save_pretrained(tmp_path)
    index, text = (json.loads((folder / "model_index.json").read_text()) for folder in (tmp_path, saved[0]))
    assert index.pop("_class_name") == name and text.pop("_class_name") == "PaellaPipeline"
    index.pop("_name_or_path")
    assert index == text
    assert getattr(diffusers, name) is cls and type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is cls
    if auto is not None:
        auto = getattr(auto_pipeline, auto)
        assert type(auto.from_pretrained(saved[0])) is cls
        shared = auto.from_pipe(diffusers_ext.PaellaPipeline.from_pipe(pipe))
        assert type(shared) is cls and shared.unet is pipe.unet and shared.vqvae is pipe.vqvae
        assert type(auto_pipeline.AutoPipelineForText2Image.from_pipe(shared)) is diffusers_ext.PaellaPipeline


TEXT, IMAGE, INPAINT = "AutoPipelineForText2Image", "AutoPipelineForImage2Image", "AutoPipelineForInpainting"
# Case of `contract.py` -> what AutoPipeline makes of its folder and of the pipeline itself.
AUTO = {
    **dict.fromkeys(
        ("paella", "paella-inpaint", "paella-img2img"),
        {TEXT: "PaellaPipeline", IMAGE: "PaellaImg2ImgPipeline", INPAINT: "PaellaInpaintPipeline"},
    ),
    "paella-variation": {IMAGE: "PaellaImageVariationPipeline"},
    "ldm-text": {TEXT: "LDMTextPipeline"},
    "glide": dict.fromkeys((TEXT, INPAINT), "GlidePipeline"),
    "ldm-upscale": {IMAGE: "LDMUpscalePipeline"},
    "ldm-inpaint": {INPAINT: "LDMInpaintPipeline"},
    "cascaded-upscale": {IMAGE: "CascadedUpscalePipeline"},
    "versatile-edit": {IMAGE: "VersatileEditPipeline"},
    "versatile-text-to-image": dict.fromkeys((TEXT, IMAGE), "VersatilePipeline"),
}


@pytest.mark.parametrize("name", ONE_EACH)
def test_auto_pipeline_knows_every_pipeline_that_fits_a_task(name, tmp_path):
    pipe = CASES[name].build()
    pipe.save_pretrained(tmp_path)
    for task in (TEXT, IMAGE, INPAINT):
        auto, wanted = getattr(auto_pipeline, task), AUTO.get(name, {}).get(task)
        if wanted is None:
            with pytest.raises(ValueError, match="can't find a pipeline linked to"):
                auto.from_pipe(pipe)
        else:
            shared = auto.from_pipe(pipe)
            assert type(shared).__name__ == wanted and shared.unet is pipe.unet
            assert type(auto.from_pretrained(tmp_path)).__name__ == wanted


def test_registering_again_changes_nothing_and_takes_no_name():
    def state():
        names = [name for name in dir(diffusers_ext.registration.diffusers) if name in diffusers_ext.__all__]
        table = dict(auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING)
        return names, table, {k: dict(v) for k, v in pipeline_loading_utils.LOADABLE_CLASSES.items()}

    before = state()
    assert register() and register() and state() == before
    assert before[1]["paella"] is diffusers_ext.PaellaPipeline and "PaellaUNet" in before[0]


def test_a_stock_name_is_never_replaced(monkeypatch):
    import diffusers

    stock = diffusers.UNet2DModel
    monkeypatch.setattr(diffusers_ext, "UNet2DModel", diffusers_ext.PaellaUNet, raising=False)
    monkeypatch.setattr(diffusers_ext, "__all__", [*diffusers_ext.__all__, "UNet2DModel"])
    monkeypatch.setitem(auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING, "paella", object)
    assert register() and diffusers.UNet2DModel is stock
    assert auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["paella"] is object


def test_a_diffusers_whose_tables_moved_is_announced_not_fatal(monkeypatch, caplog):
    from diffusers.utils import logging

    logging.enable_propagation()
    monkeypatch.delattr(pipeline_loading_utils, "LOADABLE_CLASSES")
    monkeypatch.delattr(auto_pipeline, "AUTO_TEXT2IMAGE_PIPELINES_MAPPING")
    assert register()
    logging.disable_propagation()
    assert "snapshot_download" in caplog.text and "AUTO_TEXT2IMAGE_PIPELINES_MAPPING" in caplog.text


def test_disk_in_a_fresh_process(saved, run_python):
    """Class-based, generic and Auto loading, without trust; a component may be handed in as an object."""
    folder, tokens = saved
    code = f"""{SAMPLE}
import diffusers_ext, diffusers
folder = {str(folder)!r}
assert "diffusers.pipelines.auto_pipeline" not in sys.modules  # it imports all of diffusers; ours fills it afterwards
assert diffusers_ext.registration.register()
report(diffusers_ext.PaellaPipeline.from_pretrained(folder))
report(diffusers.DiffusionPipeline.from_pretrained(folder))
report(diffusers.AutoPipelineForText2Image.from_pretrained(folder))
unet = diffusers_ext.PaellaUNet.from_pretrained(folder, subfolder="unet")
pipe = diffusers.DiffusionPipeline.from_pretrained(folder, unet=unet)
assert pipe.unet is unet
report(pipe)
assert type(diffusers.AutoModel.from_pretrained(folder, subfolder="unet")) is diffusers_ext.PaellaUNet
"""
    expected = ["diffusers_ext.pipelines.paella.pipeline_paella", "PaellaPipeline", tokens]
    assert reports(run_python(code, cold=True)) == [expected] * 4


def test_hub_push_in_one_process_and_pull_in_another(saved, run_python, hub, tmp_path):
    folder, tokens = saved
    push = f"""
import diffusers_ext
pipe = diffusers_ext.PaellaPipeline.from_pretrained({str(folder)!r})
pipe.push_to_hub("user/paella")
pipe.unet.push_to_hub("user/unet")
pipe.scheduler.push_to_hub("user/scheduler")
"""
    run_python(push, **hub.env(tmp_path / "pusher"))
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= hub.repos["user/paella"].keys()
    pull = f"""{SAMPLE}
import diffusers_ext, diffusers
report(diffusers.DiffusionPipeline.from_pretrained("user/paella"))
report(diffusers_ext.PaellaPipeline.from_pretrained("user/paella"))
unet = diffusers_ext.PaellaUNet.from_pretrained("user/unet")
scheduler = diffusers_ext.DiscreteRenoisingScheduler.from_pretrained("user/scheduler")
report(diffusers.DiffusionPipeline.from_pretrained("user/paella", unet=unet, scheduler=scheduler))
report(diffusers.DiffusionPipeline.from_pretrained("user/paella", local_files_only=True))
"""
    expected = ["diffusers_ext.pipelines.paella.pipeline_paella", "PaellaPipeline", tokens]
    assert reports(run_python(pull, **hub.env(tmp_path / "stranger"))) == [expected] * 4


def test_self_contained_export_needs_no_import_but_trust(saved, run_python, hub, tmp_path):
    folder, tokens = saved
    exported = export_self_contained(folder, tmp_path / "exported")
    assert (folder / "model_index.json").read_text() != (exported / "model_index.json").read_text()
    assert not (folder / "pipeline.py").exists()
    assert {p.relative_to(exported).as_posix() for p in exported.rglob("*.py")} == {
        "pipeline.py",
        "unet/diffusers_ext.py",
        "scheduler/diffusers_ext.py",
    }
    fill_hub(hub, exported)
    code = f"""{SAMPLE}
from diffusers import DiffusionPipeline
assert "diffusers_ext" not in sys.modules
report(DiffusionPipeline.from_pretrained({str(exported)!r}, trust_remote_code=True))
report(DiffusionPipeline.from_pretrained("user/paella", trust_remote_code=True))
try:
    DiffusionPipeline.from_pretrained({str(exported)!r})
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded code from a folder without trust")
"""
    expected = ["diffusers_ext.pipelines.paella.pipeline_paella", "PaellaPipeline", tokens]
    assert reports(run_python(code, cold=True, **hub.env(tmp_path / "home"))) == [expected] * 2


def test_without_import_and_without_the_package_the_error_is_clear(saved, run_python, tmp_path):
    """A plain folder needs the import; a self-contained one needs the package, and names the install line."""
    exported = export_self_contained(saved[0], tmp_path / "exported")
    code = f"""
import sys
from diffusers import DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained({str(saved[0])!r})
except (AttributeError, ValueError) as error:
    print(f"without import: {{error}}")
assert "diffusers_ext" not in sys.modules
sys.modules["diffusers_ext"] = None  # what Python itself notes for a package that is not there: ImportError
DiffusionPipeline.from_pretrained({str(exported)!r}, trust_remote_code=True)
"""
    result = run_python(code, check=False, HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 1
    assert "without import: " in result.stdout and "PaellaPipeline" in result.stdout
    assert "This model needs the package diffusers_ext: run `pip install .` in a checkout" in result.stderr


def test_opting_out_leaves_diffusers_alone(saved, run_python, tmp_path):
    """Class-based loading still works; the module paths are recorded in full, as diffusers does by itself."""
    folder, tokens = saved
    code = f"""{SAMPLE}
import diffusers, diffusers_ext
from diffusers.pipelines import auto_pipeline, pipeline_loading_utils
assert not diffusers_ext.registration.register()
assert "diffusers_ext" not in pipeline_loading_utils.LOADABLE_CLASSES and not hasattr(diffusers, "PaellaPipeline")
assert "paella" not in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
pipe = diffusers_ext.PaellaPipeline.from_pretrained({str(folder)!r})
report(pipe)
pipe.save_pretrained({str(tmp_path / "plain")!r})
report(diffusers_ext.PaellaPipeline.from_pretrained({str(tmp_path / "plain")!r}))
"""
    result = run_python(code, DIFFUSERS_EXT_NO_REGISTER="1")
    assert reports(result) == [["diffusers_ext.pipelines.paella.pipeline_paella", "PaellaPipeline", tokens]] * 2
    index = json.loads((tmp_path / "plain" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers_ext.models.unet_paella", "PaellaUNet"]
    # Such a folder loads in a registered process too.
    registered = diffusers_ext.PaellaPipeline.from_pretrained(tmp_path / "plain")
    assert list(registered.config["unet"]) == ["diffusers_ext", "PaellaUNet"]


@pytest.mark.parametrize("name, parent", [("LDMUNet", "UNet2DModel"), ("GumbelVQModel", "VQModel")])
def test_a_stock_class_refuses_the_folder_of_our_subclass(name, parent, tmp_path):
    """It drops what it does not know (the number of heads, the projection) and computes something else."""
    network = tiny_unet(heads=4) if name == "LDMUNet" else tiny_vqvae(gumbel=True)
    network.save_pretrained(tmp_path)
    register()  # twice changes nothing
    message = rf"config of a {name}, with which a {parent} .* `diffusers_ext\.{name}\.from_pretrained`"
    with pytest.raises(ValueError, match=message):
        getattr(diffusers, parent).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        getattr(diffusers, parent).from_config(network.config)
    assert type(diffusers.AutoModel.from_pretrained(str(tmp_path))) is type(network)
    stock = tiny_unet() if name == "LDMUNet" else tiny_vqvae()
    stock.save_pretrained(tmp_path / "stock")
    assert type(type(stock).from_pretrained(tmp_path / "stock")) is type(stock)
    assert type(type(network).from_pretrained(tmp_path / "stock")) is type(network)


@pytest.mark.parametrize(
    ("model", "folder", "saved_as"),
    [
        (diffusers_ext.PaellaVQModel, "ldm-text-scenes-64/vqvae", "AutoencoderKL"),
        (diffusers_ext.VersatileUNet, "ldm-text-scenes-64/unet", "UNet2DConditionModel"),
        (diffusers_ext.LDMUNet, "paella-scenes-64/unet", "PaellaUNet"),
        (diffusers_ext.GumbelVQModel, "paella-scenes-64/vqvae", "PaellaVQModel"),
    ],
)
def test_a_network_refuses_the_folder_of_another(repo_root, model, folder, saved_as):
    with pytest.raises(ValueError, match=f"config of a {saved_as}, which is another network than a {model.__name__}"):
        model.from_pretrained(repo_root / "checkpoints" / folder)


def test_a_network_takes_the_config_of_what_it_derives_from(repo_root):
    config = diffusers.UNet2DModel.load_config(repo_root / "tests" / "fixtures" / "pipelines" / "ldm-upscale" / "unet")
    assert type(diffusers_ext.LDMUNet.from_config({**config, "num_attention_heads": 2})) is diffusers_ext.LDMUNet
