"""What is known about public datasets: names of channels and labels, cases of one patient, licence, source.

`autoseg dataset import --profile NAME` writes it into dataset.json. Only what is sure is here: a licence that is not
known is None, and so is the pattern of patients where names do not tell them.
"""

from pydantic import field_validator

from autoseg.records import record

DECATHLON = "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13:4128 (2022)"
DECATHLON_URL = "http://medicaldecathlon.com"


@record
class Profile:
    """What is known about one dataset."""

    description: str
    channels: tuple[str, ...]
    labels: dict[str, int]
    group_by: str | None = None
    """Regular expression; cases with the same match are of one patient. None: no pattern tells."""
    licence: str | None = None
    reference: str | None = None
    url: str | None = None

    @field_validator("labels")
    @classmethod
    def _has_background(cls, labels: dict[str, int]) -> dict[str, int]:
        if labels.get("background") != 0 or len(set(labels.values())) < len(labels):
            raise ValueError("background must be 0, and no two labels may share a value")
        return labels


def _task(description: str, channels: tuple[str, ...], *labels: str) -> Profile:
    return Profile(
        description=f"Medical Segmentation Decathlon, {description}",
        channels=channels,
        labels={name: value for value, name in enumerate(("background", *labels))},
        licence="CC-BY-SA-4.0",
        reference=DECATHLON,
        url=DECATHLON_URL,
    )


PROFILES: dict[str, Profile] = {
    "msd_01_brain_tumour": _task(
        "Task01: brain tumours",
        ("FLAIR", "T1w", "t1gd", "T2w"),
        "edema",
        "non-enhancing tumor",
        "enhancing tumour",
    ),
    "msd_02_heart": _task("Task02: left atrium", ("MRI",), "left atrium"),
    "msd_03_liver": _task("Task03: liver and its tumours", ("CT",), "liver", "cancer"),
    "msd_04_hippocampus": _task("Task04: hippocampus", ("MRI",), "Anterior", "Posterior"),
    "msd_05_prostate": _task("Task05: zones of the prostate", ("T2", "ADC"), "PZ", "TZ"),
    "msd_06_lung": _task("Task06: lung tumours", ("CT",), "cancer"),
    "msd_07_pancreas": _task("Task07: pancreas and its tumours", ("CT",), "pancreas", "cancer"),
    "msd_08_hepatic_vessel": _task("Task08: vessels and tumours of the liver", ("CT",), "Vessel", "Tumour"),
    "msd_09_spleen": _task("Task09: spleen", ("CT",), "spleen"),
    "msd_10_colon": _task("Task10: tumours of the colon", ("CT",), "colon cancer primaries"),
    "acdc": Profile(
        description="ACDC: right ventricle, myocardium and left ventricle in cine MR, two phases a patient",
        channels=("cineMRI",),
        labels={"background": 0, "RV": 1, "MYO": 2, "LV": 3},
        group_by=r"(patient\d+)",
        licence="CC-BY-NC-SA-4.0",
        reference="Bernard et al., Deep Learning Techniques for Automatic MRI Cardiac Multi-Structures Segmentation "
        "and Diagnosis: Is the Problem Solved?, IEEE Transactions on Medical Imaging 37(11), 2514-2525 (2018)",
        url="https://www.creatis.insa-lyon.fr/Challenge/acdc/",
    ),
    "knee_cartilage": Profile(
        description="knee MR: six tissues, files train_001_V00.im and .seg with two visits a patient",
        channels=("MR",),
        labels={
            "background": 0,
            "femoral cartilage": 1,
            "medial tibial cartilage": 2,
            "lateral tibial cartilage": 3,
            "patellar cartilage": 4,
            "medial meniscus": 5,
            "lateral meniscus": 6,
        },
        group_by=r"((?:train|valid|test)_\d+)_V\d+",
        reference="Desai et al., The International Workshop on Osteoarthritis Imaging Knee MRI Segmentation Challenge, "
        "Radiology: Artificial Intelligence 3(3), e200078 (2021)",
    ),
    "lower_limb_bones": Profile(
        description="MR of the lower limbs: four bones, one binary mask a bone",
        channels=("MR",),
        labels={"background": 0, "femur": 1, "tibia": 2, "fibula": 3, "pelvis": 4},
    ),
}
"""The last two come as one mask a structure, so their values are ours: compare the order of one-hot arrays with it."""
