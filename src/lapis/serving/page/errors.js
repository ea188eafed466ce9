// What went wrong, in the reader's language; what the server says itself follows, in its own words.
import { number, t } from "./language.js";

/** The sentences for a ServerError. */
export function errorText(error) {
  const wait = error.kind === "busy" && error.seconds ? ` ${t("error_wait", { seconds: number(error.seconds) })}` : "";
  const detail = error.detail && error.kind !== "key" ? ` ${t("error_detail", { detail: error.detail })}` : "";
  return t(`error_${error.kind}`) + wait + detail;
}
