"""Draw the bundled image and video, `scene.png` and `clip.mp4`. This needs PyAV (the dev extra).

python -m model.demo.media
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from model.demo import scenes
from model.demo.captions import described

FOLDER = Path(__file__).parent / "media"
IMAGE, VIDEO = FOLDER / "scene.png", FOLDER / "clip.mp4"
SIDE, NUM_FRAMES, RATE = 384, 49, 16


def showpieces() -> tuple[scenes.Scene, scenes.Scene]:
    """Choose a held-out scene of five objects in four textures, and a clip with a collision and a leaving object."""
    images = (scenes.random_image_scene(scenes.scene_seed("heldout", "image", i)) for i in range(10_000, 20_000))
    image = next(s for s in images if len(s.things) == 5 and len({t.texture for t in s.things}) == 4)
    videos = (scenes.random_video_scene(scenes.scene_seed("heldout", "video", i)) for i in range(10_000, 20_000))
    video = next(s for s in videos if {"collide", "leave"} <= {t.motion.kind for t in s.things})
    return image, video


def main() -> None:
    """Write both files and print the objects that they show."""
    import av

    image, video = showpieces()
    FOLDER.mkdir(exist_ok=True)
    Image.fromarray(scenes.render(image, SIDE)).save(IMAGE, optimize=True)
    with av.open(str(VIDEO), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "18"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in scenes.render_clip(video, NUM_FRAMES, SIDE):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    for scene in (image, video):
        print(", ".join(described(t) for t in scene.things))


if __name__ == "__main__":
    main()
