"""Does one way of training learn as another does? Paired runs of one configuration, and what may be said of them.

    arms         what differs between the runs, as overlays of a configuration
    trials       the runs of a comparison: whole configurations, a folder each
    run          carries them out, each in a process of its own, and goes on where it was stopped
    outcome      what a run came to, read from its folder
    statistics   paired gaps, their interval, the verdict
    report       the figures as JSON, Markdown and one HTML page; pictures draws them
    sweep        loss against learning rate, of the same trials

Paired: the runs of a seed have the same initial weights and the same data in the same order, so that what they share
cancels in the difference. That is most of the noise: seeds differ by half a percent where pairs differ by a fiftieth
of that.
"""
