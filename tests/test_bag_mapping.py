import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import bag_samples as bags

from embodied.contracts.errors import ConfigError, InputError
from embodied.datasets import bag_mapping
from embodied.datasets.bag_mapping import read_mapping
from embodied.datasets.importer import import_dataset, recognise

WHOLE = """\
clock: {topic: /camera}
observations:
  arm: {topic: /joint_states, field: position, joints: [a]}
images: {wrist: {topic: /camera}}
action: {next: arm}
"""


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "m.yaml").write_text(text)
    return tmp_path / "m.yaml"


def small_bag(path: Path, seconds: int = 3) -> Path:
    rows: list[bags.Row] = []
    for k in range(seconds * 10):
        now = bags.ns(k * 0.1)
        rows.append((now, "/joint_states", bags.JOINT_STATE, bags.joint_state(now, ("a", "b"), (k, -k))))
        if k % 2 == 0:
            rows.append((now, "/camera", bags.IMAGE, bags.image(now, np.full((2, 2, 3), k, np.uint8))))
        rows.append((now, "/goal", bags.TRAJECTORY, bags.trajectory(now, ("b", "a"), [(k, k)])))
    return bags.write_mcap(path, rows)


def test_the_example_in_the_documentation_is_valid(tmp_path):
    assert bag_mapping.__doc__ is not None
    block = bag_mapping.__doc__.split("\n\n")[1]
    mapping = read_mapping(written(tmp_path, block))
    assert mapping.images["wrist"].size == (84, 84)
    assert mapping.action is not None
    assert mapping.action.mode == "joint_position"
    assert mapping.topics() == {
        "/camera/image_raw",
        "/joint_states",
        "/ee_pose",
        "/controller/joint_trajectory",
    }


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("clock:", "clok:", "unknown key 'clok'. Did you mean 'clock'"),
        ("field:", "feld:", r"unknown key 'feld' in 'observations.arm'. Did you mean 'field'"),
        ("{topic: /camera}\nobs", "{}\nobs", "either a topic or a rate"),
        ("{topic: /camera}\nobs", "{topic: /camera, rate: 10}\nobs", "either a topic or a rate"),
        ("{topic: /camera}\nobs", "{rate: -1}\nobs", "rate"),
        ("images:", "stamps: heder\nimages:", "Did you mean 'header'"),
        ("{next: arm}", "{next: arn}", "no observation 'arn'. Did you mean 'arm'"),
        ("{next: arm}", "{next: arm, mode: joint_positon}", "Did you mean 'joint_position'"),
        ("{next: arm}", "{next: arm, joints: [a]}", "leave them out"),
        ("{next: arm}", "{mode: raw}", "either a topic of commands or 'next'"),
        ("  arm:", "  age_arm:", "cannot be called 'age_arm'"),
        ("  arm:", "  ../arm:", "Expected `str` matching regex"),
        ("{wrist:", "{arm:", "'arm' is observation and camera"),
        ("images:", "max_age: .nan\nimages:", "max_age"),
        ("images:", "success: !!python/object/apply:os.getcwd []\nimages:", "cannot be read as YAML"),
        (WHOLE, "- a\n", "must hold keys"),
        (WHOLE, "clock: {rate: 1}\nobservations: {}\n", "nothing would be imported"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path, old, new, reason):
    assert old in WHOLE
    with pytest.raises(ConfigError, match=reason):
        read_mapping(written(tmp_path, WHOLE.replace(old, new, 1)))


def test_a_bag_without_a_mapping_is_refused_with_its_topics(tmp_path):
    path = small_bag(tmp_path / "bag" / "bag_0.mcap")
    with pytest.raises(InputError) as caught:
        import_dataset(path, tmp_path / "s")
    text = str(caught.value)
    assert "/joint_states  sensor_msgs/msg/JointState  30 messages, 10 Hz" in text
    assert "/camera  sensor_msgs/msg/Image  15 messages, 5 Hz" in text
    assert "--options mapping FILE" in text
    assert "--options propose FILE" in text


def test_a_draft_is_written_once_and_imports(tmp_path):
    path = small_bag(tmp_path / "bag" / "bag_0.mcap")
    draft = tmp_path / "draft.yaml"
    with pytest.raises(ConfigError, match=rf"Wrote {draft}.*Edit it"):
        import_dataset(path, tmp_path / "s", options={"propose": str(draft)})
    with pytest.raises(ConfigError, match="cannot be written"):
        import_dataset(path, tmp_path / "s", options={"propose": str(draft)})
    found = yaml.safe_load(draft.read_text())
    assert found["clock"] == {"topic": "/camera"}
    assert found["observations"]["joint_position"]["joints"] == ["a", "b"]
    assert found["action"]["joints"] == ["b", "a"]
    assert found["action"]["topic"] == "/goal"
    store = import_dataset(path, tmp_path / "s", options={"mapping": str(draft)})
    assert store.episode_length.tolist() == [15]
    assert store.attributes["provenance"]["source_attributes"]["mapping"]["clock"]["topic"] == "/camera"
    action = store.episode(0).action
    assert action is not None
    # The command of the row's own time is no answer to it; the next comes one tenth later.
    assert action[:3].tolist() == [[1, 1], [3, 3], [5, 5]]


def test_a_mapping_beside_the_bag_is_found_and_a_contract_wins_not(tmp_path):
    path = small_bag(tmp_path / "bag" / "bag_0.mcap")
    (tmp_path / "bag" / "embodied_mapping.yaml").write_text(WHOLE)
    for number, source in enumerate((path, tmp_path / "bag", tmp_path)):
        assert recognise(source) == "rosbag2"
        store = import_dataset(source, tmp_path / f"s{number}")
        assert store.episode_length.tolist() == [15]
    with pytest.raises(ConfigError, match="either a contract or a mapping"):
        import_dataset(path, tmp_path / "t", options={"mapping": "a", "contract": "b"})
    with pytest.raises(ConfigError, match="Did you mean 'mapping'"):
        import_dataset(path, tmp_path / "t", options={"maping": "a"})


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("/joint_states", "/joint_state", r"no topic '/joint_state'. Did you mean '/joint_states'"),
        ("joints: [a]", "joints: [aa]", "never names the joint 'aa'"),
        ("field: position", "field: positon", r"Fields with numbers: position\[\], velocity\[\], effort\[\]"),
        ("field: position", "field: velocity", "never has a number in 'velocity'"),
        ("images: {wrist: {topic: /camera}}", "images: {wrist: {topic: /camra}}", "Did you mean '/camera'"),
        ("images: {wrist: {topic: /camera}}", "images: {wrist: {topic: /goal}}", "no camera"),
        ("field: position, joints: [a]", "field: header", "holds no numbers in 'header'"),
        (
            "{topic: /joint_states, field: position, joints: [a]}",
            "{topic: /camera, joints: [a]}",
            "has no list of names",
        ),
    ],
)
def test_a_mapping_that_does_not_fit_the_bag_is_told_what_would(tmp_path, old, new, reason):
    path = small_bag(tmp_path / "bag" / "bag_0.mcap")
    assert old in WHOLE
    file = written(tmp_path, WHOLE.replace(old, new, 1))
    with pytest.raises(InputError, match=reason):
        import_dataset(path, tmp_path / "s", options={"mapping": str(file)})
