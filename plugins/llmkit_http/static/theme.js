// The theme that was chosen, set before anything is drawn so that nothing flashes. settings.js changes it.
document.documentElement.dataset.theme = localStorage.getItem("llmkit.theme") ?? "auto";
