// Whether a video element shows a picture that has not been taken yet. The element itself goes on
// showing the last one when its source stalls, and in a hidden page.

export class FreshPictures {
  #video;
  #shown = 0;
  #taken = 0;
  #changed = 0;

  constructor(video) {
    this.#video = video;
    if (video.requestVideoFrameCallback) this.#await();
  }

  #await() {
    this.#video.requestVideoFrameCallback(() => {
      this.#shown += 1;
      this.#changed = performance.now();
      this.#await();
    });
  }

  // Browsers without the callback: pictures are counted, or time is.
  #look() {
    if (this.#video.requestVideoFrameCallback) return;
    const shown = this.#video.getVideoPlaybackQuality?.().totalVideoFrames ||
      this.#video.currentTime;
    if (shown !== this.#shown) this.#changed = performance.now();
    this.#shown = shown;
  }

  get isFresh() {
    this.#look();
    return this.#shown !== this.#taken;
  }

  take() {
    this.#taken = this.#shown;
  }

  // Milliseconds since a new picture was shown.
  get age() {
    this.#look();
    return performance.now() - this.#changed;
  }

  reset() {
    this.#changed = performance.now();
  }
}
