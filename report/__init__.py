"""What came out of training, for people: a table, pictures, and a page that shows both."""

from report.page import as_page
from report.plots import PLOTTING, comparison, curve
from report.table import Row, as_csv, as_table
