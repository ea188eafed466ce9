// A browser starts no worker from a file. Where the book is read from a folder, its search runs in a hidden frame, which
// takes and sends messages as a worker does. The name IFrameWorker is what the search looks for.
(() => {
  "use strict";
  if (location.protocol !== "file:") return;

  class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.title = "search";
      document.body.append(frame);
      this.scope = frame.contentWindow;
      const page = this.scope.document;
      this.scope.importScripts = (...sources) => sources.reduce(
        (before, source) => before.then(() => this.load(page, source)), Promise.resolve());
      this.scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      this.ready = this.load(page, url);
    }

    load(page, source) {
      return new Promise((resolve, reject) => {
        const script = page.createElement("script");
        script.src = source;
        script.onload = resolve;
        script.onerror = () => reject(new Error(`${source} cannot be read`));
        page.head.append(script);
      });
    }

    postMessage(data) {
      this.ready.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.scope.frameElement.remove();
    }
  }

  window.IFrameWorker = IFrameWorker;
  window.Worker = IFrameWorker;
})();
