"""Columns of a manifest out of DICOM headers: numbers and codes, never what identifies a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from synthcube import plugins
from synthcube.data.dicom_files import NEEDS_EXTRA, damage, is_readable
from synthcube.errors import ManifestError

if TYPE_CHECKING:
    from pydicom import Dataset

# What may become a column: numbers, codes and ages. Names, dates, times, UIDs and free text, into
# which anything is typed, may not.
_REPRESENTATIONS = {"AS", "CS", "DS", "IS", "FL", "FD", "SS", "US", "SL", "UL", "SV", "UV"}
# Text that the makers of scanners write, not people.
_TEXTS = {
    "Manufacturer", "ManufacturerModelName", "ConvolutionKernel", "SoftwareVersions",
    "ContrastBolusAgent",
}  # fmt: skip
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
_OLDEST = 90
"""Where HIPAA counts an age as identifying: older people are all of this age."""


def check_columns(names: Sequence[str]) -> None:
    """Raise a ManifestError unless all names are keywords of DICOM that identify nobody."""
    if not names:
        return
    if not is_readable():
        raise ManifestError(f"--dicom_columns: {NEEDS_EXTRA}")
    if faults := [fault for name in names if (fault := _fault(name))]:
        raise ManifestError(
            "--dicom_columns takes keywords of DICOM that are numbers or codes, such as "
            "Modality,PatientAge,PatientSex,SliceThickness,ManufacturerModelName:",
            faults,
        )


def _fault(name: str) -> str:
    from pydicom.datadict import dictionary_VR, keyword_dict

    if name not in keyword_dict:
        hint = plugins.did_you_mean(name, [*keyword_dict])
        return f"{name} is no keyword of DICOM{hint}"
    representations = set(dictionary_VR(keyword_dict[name]).split(" or "))
    if name in _TEXTS or representations <= _REPRESENTATIONS:
        return ""
    return (
        f"{name} may identify a person, as names, dates, numbers of documents, UIDs and free text "
        "do; it is never written to a manifest"
    )


def cells_of(dataset: Dataset, names: Sequence[str]) -> dict[str, str]:
    """The cells of the columns `names`; empty where a header does not have them, or damaged.

    An age is a number of years, 90 at most. What differs between slices is that of the first.
    """
    cells = {}
    for name in names:
        try:
            cells[name] = _cell(_value(dataset, name), name)
        except damage():
            cells[name] = ""
    return cells


def _value(dataset: Dataset, name: str) -> Any:
    """A value at the top, or in the groups of all frames or of the first one."""
    if dataset.get(name) not in (None, ""):
        return dataset[name].value
    for key in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for groups in list(dataset.get(key) or ())[:1]:
            for group in groups:
                for item in list(group.value)[:1] if group.VR == "SQ" else ():
                    if item.get(name) not in (None, ""):
                        return item[name].value
    return None


def _cell(value: Any, name: str) -> str:
    from pydicom.datadict import dictionary_VR
    from pydicom.multival import MultiValue

    if value is None:
        return ""
    kind = dictionary_VR(name)
    values = list(value) if isinstance(value, (MultiValue, list, tuple)) else [value]
    if kind == "AS":
        return _years(str(values[0]))
    is_text = kind in ("CS", "LO", "SH")
    texts = [" ".join(str(v).split()) if is_text else f"{float(v):.6g}" for v in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def _years(age: str) -> str:
    """An age such as 045Y or 018M in years."""
    number, unit = age.strip()[:-1], age.strip()[-1:].upper()
    if not number.isdigit() or unit not in _YEARS:
        return ""
    return f"{min(int(number) * _YEARS[unit], _OLDEST):.4g}"
