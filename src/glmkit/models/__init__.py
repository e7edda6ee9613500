"""One file per architecture. The mathematics is plain torch; the shell around it is what transformers expects."""
