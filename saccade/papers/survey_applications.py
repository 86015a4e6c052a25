"""Which system serves which task: the library's own map, in the survey's five domains and those it has no name for.

The survey sorts transformers by what they are applied to: computer vision, language, multi-modality, audio and speech,
signals. Here every system of the mission stands under its tasks, with what one types to use it; the page
`docs/tasks.md` is made of this table and the cards.

Islam, Elmekki, Elsebai, Bentahar, Drawel, Rjoub, Pedrycz, "A Comprehensive Survey on Applications of Transformers for
Deep Learning Tasks", 2023, section 4.
"""

from __future__ import annotations

from typing import NamedTuple

from saccade.core.card import Card

CARD = Card(
    "A Comprehensive Survey on Applications of Transformers for Deep Learning Tasks",
    authors="Islam, Elmekki, Elsebai, Bentahar, Drawel, Rjoub, Pedrycz",
    year=2023,
    systems=("survey_applications",),
    arxiv="2306.07303",
    read="abstract",
    keywords="survey, applications, tasks, map",
    kinds=("docs",),
    tests=("tests/papers/test_survey_applications.py",),
)


class Task(NamedTuple):
    """A task in words, the domain it belongs to, and where one starts (empty: nothing is there yet).

    `commands` are all of `saccade` that serve the task, `start` is what there is besides.
    """

    name: str
    domain: str
    start: str = ""
    commands: tuple[str, ...] = ()

    @property
    def starts(self) -> str:
        """Commands and the rest, as one types them: "`saccade train`, `restore`, `saccade.attribution.restoration`"."""
        first = [f"`{'' if place else 'saccade '}{command}`" for place, command in enumerate(self.commands)]
        return ", ".join(first + [self.start] * bool(self.start))


# By the kind that the mission gives its systems.
TASKS: dict[str, Task] = {
    "backbones": Task("classifying images, features for all other tasks", "vision",
                      commands=("compare", "train", "eval", "predict", "bench", "weights")),
    "mixers": Task("mixing tokens in any backbone", "vision", "`create_model(..., mixer=NAME)`, `swap`",
                   ("compare", "bench")),
    "ops": Task("the operations under them, fast", "vision", "`saccade.ops`"),
    "dynamic": Task("computing less on easy images and tokens", "vision", "both with `--apply`; `saccade.apply`",
                    ("compare", "explain")),
    "pretrain": Task("learning from images without labels", "vision", commands=("pretrain", "probe")),
    "explain": Task("seeing what a model looks at, and judging it", "vision", "`saccade.record`, `saccade.explain`",
                    ("explain", "trust")),
    "restoration": Task("enlarging, denoising, deblurring, deraining", "vision", "`saccade.attribution.restoration`",
                        ("restore", "train")),
    "segmentation": Task("a class or an object for every pixel", "vision",
                         "`create_model(\"ddrnet_23_slim\", num_classes=...)`: logits of an eighth"),
    "detection": Task("boxes of objects", "vision"),
    "tracking": Task("following an object through a video", "vision"),
    "video": Task("recognising and predicting video", "vision", "`create_model(\"predformer_...\")`"),
    "volumes": Task("medical volumes", "vision"),
    "points": Task("point clouds", "vision"),
    "faces": Task("faces: recognition, attributes, pose", "vision"),
    "human": Task("people: pose, gait, parsing", "vision"),
    "retrieval": Task("finding the same thing again", "vision",
                      "`create_model(\"dcal_deit_...\", num_classes=0)` gives descriptors"),
    "anomaly": Task("finding what is wrong", "vision"),
    "robust": Task("staying right under disturbance", "vision", "`saccade.papers.attention_iat.adversarial_loss`"),
    "multitask": Task("several tasks from one model", "vision"),
    "compress": Task("smaller and faster models", "vision", "`docs/deployment.md`", ("export", "bench")),
    "diffusion": Task("making and editing images by diffusion", "multi-modality"),
    "generation": Task("making images otherwise", "multi-modality"),
    "vlm": Task("images and language together", "multi-modality"),
    "sequences": Task("language, audio, recommendation, signals", "language, audio and signals",
                      "`saccade.papers.sasrec.SASRec`, `create_mixer` on grids of one axis"),
    "scale": Task("contexts that no machine holds alone", "language, audio and signals",
                  "`saccade.papers.unified_sequence.ring_attention`"),
    "docs": Task("surveys, as measured tables", "all", "`docs/mixers.md`, `docs/lengths.md`, this page"),
}
