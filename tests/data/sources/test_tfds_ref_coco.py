"""TFDS's ref_coco, in a miniature that TFDS's own generator makes of the published annotation file."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.ref_coco import ref_coco_dataset_builder as official

from argenseg_jax.data.mixture import open_mixture, open_source
from argenseg_jax.errors import UserError

BOXES = {1: [0, 0, 6, 0, 6, 8, 0, 8], 2: [9, 0, 12, 0, 12, 8, 9, 8]}


class RefCocoMini(official.Builder):
    """The official builder; its _info reads a README that is in no installed package."""

    url_infos = {}

    def _info(self):
        f = tfds.features
        box = {"id": np.int64, "area": np.int64, "bbox": f.BBoxFeature(), "label": np.int64}
        return tfds.core.DatasetInfo(
            builder=self,
            features=f.FeaturesDict(
                {
                    "image": f.Image(encoding_format="jpeg"),
                    "image/id": np.int64,
                    "objects": f.Sequence(
                        {
                            **box,
                            "gt_box_index": np.int64,
                            "mask": f.Image(encoding_format="png"),
                            "refexp": f.Sequence({"refexp_id": np.int64, "raw": f.Text()}),
                        }
                    ),
                    "coco_annotations": f.Sequence(box),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"validation": self._generate_examples("refcoco", "unc", "validation", dl_manager)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ref_coco")
    (root / "coco_train2014").mkdir()
    images, refs = {}, []
    for image in (7, 8):
        Image.new("RGB", (12, 8), (image, 0, 0)).save(root / "coco_train2014" / f"{image}.jpg")
        anns = {
            k: {
                "id": 10 * image + k,
                "area": 9,
                "bbox": [0, 0, 6, 8],
                "category_id": 1,
                "iscrowd": 0,
                "image_id": image,
                "segmentation": [box],
            }
            for k, box in BOXES.items()
        }
        images[str(image)] = {
            "anns": list(anns.values()),
            "info": {"id": image, "file_name": f"{image}.jpg", "height": 8, "width": 12},
        }
        refs += [
            {
                "ref_id": k,
                "dataset": "refcoco",
                "dataset_partition": "unc",
                "split": "val",
                "image_id": image,
                "ann": anns[k],
                "sentences": [{"sent_id": n, "raw": f"man {n} of {k}"} for n in range(k)],
            }
            for k in anns
        ]
    (root / "refcoco.json").write_text(json.dumps({"ref": refs, "coco_anns": images}))
    builder = RefCocoMini(config="refcoco_unc", data_dir=root / "out", file_format="array_record")
    with pytest.MonkeyPatch.context() as patch:  # in writing, TFDS wants TensorFlow for names of dtypes
        patch.setattr(tfds.features.TensorInfo, "dtype", property(lambda info: info.np_dtype))
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(root)))
    return builder.data_path


def test_one_sample_per_expression(folder):
    source = open_source(f"tfds:{folder}:val", prompt="semantic")
    assert len(source) == 6 == len(open_source(f"tfds:{folder}:validation"))
    sample = source[5]
    assert sample.conversations[0]["value"] == "<image>\n Please segment man 1 of 2 in this image."
    assert np.flatnonzero(sample.masks[0].all(0)).tolist() == [9, 10, 11]
    assert set(np.unique(sample.masks[0])) == {0, 255} and sample.masks[0].shape == (8, 12)
    assert sample.images[0].shape == (8, 12, 3) and sample.meta["metric"] == "referring"
    assert "record 1, 'man 1 of 2'" in sample.meta["line"]
    assert np.flatnonzero(source[0].masks[0].all(0)).tolist() == [*range(6)]
    assert [(p.length, p.weight) for p in open_mixture((f"tfds:{folder}:val*2",))] == [(6, 12)]


def test_faults(folder, tmp_path):
    with pytest.raises(UserError, match="no split 'train'; it has validation"):
        open_source(f"tfds:{folder}")
    with pytest.raises(UserError, match="no data set; looked for dataset_info.json"):
        open_source(f"tfds:{tmp_path}")
