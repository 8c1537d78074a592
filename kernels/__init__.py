"""Operations of jagged sequence models: one operation a folder, a readable torch version in each.

Knows nothing of steps/ and needs torch alone. In the repository it is imported as `kernels`, installed as
`hstu_kernels`: `kernels` is the name of a public package.
"""

import sys

_OPERATORS = "hstu"  # torch's namespace of the operators that these modules register

for _other in {"kernels", "hstu_kernels"} - {__name__}:
    if getattr(sys.modules.get(_other), "_OPERATORS", None) == _OPERATORS:
        raise ImportError(
            f"{__name__} is {_other} under another name, which is imported already: one process can register torch's "
            f"operators hstu::* once; import one of the two everywhere"
        )
