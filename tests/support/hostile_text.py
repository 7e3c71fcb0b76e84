"""What a model may answer and a data set may hold to act on whatever shows it."""

HOSTILE = (
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "</code></td></tr></table></main><script>document.title='owned'</script>",
    "&lt;script&gt;document.title='owned'&lt;/script&gt; &#60;b&#62; &amp;lt;",
    "<svg/onload=document.title='owned'><iframe srcdoc='<script>1</script>'></iframe>",
    "<!-- comment --> <style>* { display: none }</style> <base href=http://evil.example/>",
    '"><a href="javascript:document.title=1">x</a>',
    "[link](javascript:alert(1)) ![image](http://evil.example/x.png) [ref]: http://evil.example",
    "<http://evil.example> http://evil.example www.evil.example someone@evil.example",
    "| a | b |\n| --- | --- |\n| c | d |",
    "one | two || three \\| four \\\\| five",
    "```\ncode\n``` `code` ``more` ` $x^2$ $$y$$ \\(z\\) \\[w\\] \\boxed{7}",
    "# heading\n## another\n\n- list\n1. list\n> quote\n\n---\n\nsetext\n===",
    "**bold** __bold__ _it_ *it* ~~gone~~ ==mark== ^up^ [^1] [x] :smile: #1 @someone",
    "\x1b[31mred\x1b[0m \x1b[2J\x1b[H \x9b31m \x07 \x08\x08\x08 \r overwritten",
    "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\ \x1b]0;title\x07",
    "\u202eleft to right\u202c \u2066isolate\u2069 \u200b\u200d\ufeff \u2028 \u2029 \x85",
    "NUL \x00 and \x01 and \ufffe and \U000e0041 and \ue000",
    "{{ jinja }} {% raw %} ${shell} `$(touch owned)` %(percent)s {0} {name}",
    "=cmd|'/c calc'!A1 +1 -1 @SUM(1)",
)
PLAIN = tuple(f"a plain answer {i}" for i in range(len(HOSTILE)))
