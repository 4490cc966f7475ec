"""What diffusers must know of this package to load its classes; imported by every file that has a loadable one.

From the Hub, unlike from a folder, diffusers loads components of the libraries in a table alone. It then asks this
package for the base class by the name in the table, which `diffusers_mp.__getattr__` answers.
"""

from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES


LOADABLE_CLASSES["diffusers_mp"] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
