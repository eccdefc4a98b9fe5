"""Quantize the trained weights to 8 bits with mlx-lm.

    python -m demo.training.export build/trained

reads the bfloat16 weights from that folder, writes ``demo/model/model.safetensors`` with its index, and puts the
quantization into ``demo/model/config.json``. ``--float FOLDER`` also keeps the model before quantization, for
comparison.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from mlx_lm.utils import load_config, load_model, quantize_model, save_config, save_model

from demo import MODEL

BITS, GROUP_SIZE = 8, 64


def main() -> None:
    """Quantize the weights and save them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trained", type=Path, help="folder with the trained weights")
    parser.add_argument("--to", type=Path, default=MODEL, help="folder to write to (default: demo/model)")
    parser.add_argument("--float", type=Path, help="folder for the model before quantization")
    options = parser.parse_args()
    config = {key: value for key, value in load_config(MODEL).items() if not key.startswith("quantization")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.float or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (*MODEL.glob("token*.json"), MODEL / "chat_template.jinja", *options.trained.glob("model*")):
            shutil.copy(file, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        model, _ = load_model(folder, lazy=False)
    model, config = quantize_model(model, config, GROUP_SIZE, BITS, quant_predicate=model.quant_predicate)
    save_model(options.to, model)
    save_config(config, options.to / "config.json")


if __name__ == "__main__":
    main()
