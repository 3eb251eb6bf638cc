"""A transform of your own, named `my_transforms:SquareRoot` in the YAML."""

import torchio as tio


class SquareRoot(tio.IntensityTransform):
    """Brightens dark tissue: the square root of every non-negative intensity."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        for image in self.get_images(subject):
            image.set_data(image.data.float().clamp(min=0).sqrt())
        return subject
