"""Small tables of real data with what real tables have: texts, missing values, identifiers."""

import numpy as np
import pandas as pd
from sklearn.datasets import load_breast_cancer, load_diabetes

FEATURES = ["mean radius", "mean texture", "size", "marked"]


def cancer_frame():
    """Breast cancer: numbers with missing ones, texts with missing ones, booleans, leftovers."""
    data = load_breast_cancer(as_frame=True).frame
    random = np.random.default_rng(0)
    size = pd.cut(data["mean area"], 4, labels=["tiny", "small", "large", "huge"]).astype(object)
    size[random.random(len(data)) < 0.1] = None
    radius = data["mean radius"].where(random.random(len(data)) > 0.1)
    return pd.DataFrame(
        {
            "id": [f"p{k:03}" for k in range(len(data))],
            "mean radius": radius,
            "mean texture": data["mean texture"],
            "size": size,
            "marked": data["mean concavity"] > 0.1,
            "day": pd.date_range("2020-01-01", periods=len(data)).date,
            "always": 1,
            "kind": np.where(data["target"] == 1, "benign", "malignant"),
        }
    )


def diabetes_frame():
    """Diabetes in natural units, numbers only."""
    return load_diabetes(as_frame=True, scaled=False).frame
