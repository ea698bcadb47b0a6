"""A reader of mermaid flowcharts that is stricter than mermaid."""

import re

# One line of a flowchart as this package draws it: a node with its label in quotes, or an edge.
NODE = re.compile(r'    n\d+\["((?:[^"#<>&`\\\n]|#(?:quot|lt|gt|amp|35|96|92);|<br/>)*)"\]')


EDGE = re.compile(r"    (n\d+) --> (n\d+)")


SHOWN = {"#quot;": '"', "#lt;": "<", "#gt;": ">", "#amp;": "&", "#35;": "#", "#96;": "`", "#92;": "\\"}


def read_flowchart(text):
    """Labels by node, and edges, of a flowchart; AssertionError for anything that mermaid might read otherwise."""
    first, *lines = text.split("\n")
    assert first == "flowchart LR"
    nodes, edges = {}, []
    for line in lines:
        node, edge = NODE.fullmatch(line), EDGE.fullmatch(line)
        assert node or edge, line
        if node:
            label = node[1].split("<br/>")
            nodes[line.split("[")[0].strip()] = [re.sub(r"#\w+;", lambda m: SHOWN[m[0]], x) for x in label]
        else:
            edges.append(edge.groups())
    assert all(end in nodes for edge in edges for end in edge)
    return nodes, edges
