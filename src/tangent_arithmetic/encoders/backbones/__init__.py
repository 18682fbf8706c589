"""Image backbones without a text tower: timm, torchvision, and modules of your own."""
