"""Models by name, by file or as objects, each a `ModelSource` that builds the same module every time.

resnet50                        torchvision
timm:resnet18                   timm
hf:FOLDER | config.json | bert  transformers
path/to/file.py:callable        own code
package.module:callable         own code
onnx:path/to/model.onnx         an ONNX file, with its weights
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
